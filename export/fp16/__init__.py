"""Half precision: where a graph keeps float32, and why."""
