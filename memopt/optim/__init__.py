"""The optimizer's update as the third phase of a step: `photograph`."""
