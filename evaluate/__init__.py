"""Evaluation: TruthfulQA, generated answers, HaluEval QA, harm on neutral text, comparisons, reports."""
