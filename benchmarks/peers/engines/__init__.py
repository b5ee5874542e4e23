"""The engines' side: each module runs one engine in a process of its own environment.

Modules here import the standard library, `hasten.core.errors` and `hasten.measure.wire` alone at the top, and their
engine's package when the engine is made.
"""
