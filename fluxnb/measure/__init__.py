"""How a latency is taken, what the machine did meanwhile, ceilings, quality, ranks and load."""
