"""Searches the weights of a mix on held-out rows, within a budget of trials.

Method and density can be searched too.
"""
