"""What the families of models share: attention, key/value cache, sharding, quantisation."""
