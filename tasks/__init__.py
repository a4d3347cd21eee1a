"""The stages of the pipeline: thin Prefect tasks here, the work they do in the packages below."""
