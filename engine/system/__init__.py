"""What the engine asks of the operating system: files, signals, threads, processor, the CUDA driver, imports."""
