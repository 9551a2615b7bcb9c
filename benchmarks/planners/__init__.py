"""The planner tier: every planner plans on the same exported step graph, one neutral simulator scores them.

`python -m benchmarks.planners` runs it; docs/notes/008-proving-ground.md says what is compared and how.
"""
