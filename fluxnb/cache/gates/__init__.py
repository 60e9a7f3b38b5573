"""When to reuse: a gate looks at a step and says whether the transformer's blocks may be skipped.

One rule a file. A gate that can be chosen by hand is named in `fluxnb.families`, and nowhere else.
"""
