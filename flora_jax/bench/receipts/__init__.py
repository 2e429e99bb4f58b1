"""What every result carries: machine, command, timing; and lines of results that are collected."""
