"""Training on preferences: DPO, ORPO and SimPO on pairs of a chosen and a rejected answer.

answer_rows.py reads the rows, says what is wrong with a data set of them and makes tokens of them,
side_by_side.py lays their answers out for the model, reference_likelihoods.py has what the
reference model gives each answer, training_loss.py the formulas with their papers and the loss of a
run. gate_check.py measures whether the preference was learnt, and verdict_block.py shows it.
"""
