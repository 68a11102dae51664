"""Recovery inside an allocation: run on healthy hosts, and go on without those that failed."""
