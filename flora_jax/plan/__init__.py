"""What a model needs on a GPU: memory, modelled times, compiled programs, simulated serving."""
