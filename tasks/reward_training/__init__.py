"""Trains a reward model on stories and their scores; it knows no Prefect."""
