"""What is run: pipelines, use cases, the embedded models and what a use case starts from."""
