"""Evaluation of a pre-trained model beside baselines: zero-shot classification, retrieval, linear probes."""
