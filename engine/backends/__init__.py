"""Sessions: a graph opened on a library, with named buffers."""
