"""Tokenizers, starting noise, sampler tables, the DNS/DNP loop, captioning. numpy only, no torch."""
