"""What is read of a model's folder, and the modules that become its graphs."""
