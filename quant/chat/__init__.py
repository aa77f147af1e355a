"""A conversation in the terminal, to try a model before it is shipped, or beside another one.

Everything it takes is the project's own: the recipe's settings, the template in its sandbox, the
samplers that `evaluate` uses. So what loops here would loop for a user.
"""
