"""`python -m experiments.benchmark`: what a step costs, side by side with what it is compared to.

`__main__.py` is the command; each other module measures one thing.
"""
