"""Evaluation: TruthfulQA, HaluEval QA, harm on neutral text, comparisons, reports."""
