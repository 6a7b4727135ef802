"""Compiled plans: what changes one, where they are kept, and the compilers that make them."""
