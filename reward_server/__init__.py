"""The reward model behind HTTP: application, batching, scorer, schemas and a typed client."""
