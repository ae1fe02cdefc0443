"""The rules that check a data set, as tables of pandera checks.

line_rules, file_rules and token_rules are the tables; rule_table runs one over a frame and turns
failing rows into findings. related_lines finds repeated lines before the rules run, and applies
data_policy; split_statistics counts. The findings are in records/dataset.py.
"""
