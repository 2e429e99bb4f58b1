"""What a model needs on a GPU: memory, modelled times, programs compiled ahead of time, simulated serving."""
