"""What is switched on: each module holds techniques (see fluxnb.technique) of one kind."""
