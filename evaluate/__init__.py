"""Evaluation: protocols, TruthfulQA, reports."""
