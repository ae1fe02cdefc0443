"""Before a run: a first configuration, and what one will do.

suggested_config.py writes one; run_explanation.py finds out, and says, what a run does and costs.
learning_rate_rule.py compares a learning rate with the best ones.
"""
