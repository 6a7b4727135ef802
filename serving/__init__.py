"""The HTTP API, its metrics and the page. FastAPI; the work is done by ``dnp.runtime``."""
