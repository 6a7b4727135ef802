"""Noise, schedules, samplers as tables, and the denoising loop."""
