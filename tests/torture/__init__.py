"""A sweep that is killed again and again ends with the bits of one that was left alone.

    python -m tests.torture --kills=200 --seed=0 --out=torture.json

Run from the repository's root. `config.py` is the sweep, `launches.py` starts and stops launchers,
`watch.py` looks at what they write, `compare.py` holds it against the undisturbed sweep.
"""
