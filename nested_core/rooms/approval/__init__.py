"""A version whose policy is `approve` waits for a person: page.py is what that person reads.

answers.py is the question and the answer: what waits, a yes that promotes, a no that is remembered.
"""
