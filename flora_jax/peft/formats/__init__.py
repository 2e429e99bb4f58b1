"""The folder of each kind of adapter, a file for each under the kind's name."""
