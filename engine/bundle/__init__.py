"""The bundle: what a deployment is, as a folder with a manifest."""
