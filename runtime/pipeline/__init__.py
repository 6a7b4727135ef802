"""A request, from prompt to pictures."""
