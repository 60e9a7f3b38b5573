"""The drawn world that the embedded model knows: its grammar, its renderer, and what reads facts off an image."""
