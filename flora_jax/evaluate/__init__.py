"""MultiPL-E: problems, generations, programs run in a sandbox, pass@k, tables."""
