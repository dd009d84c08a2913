"""PPO: experience from scored responses, clipped updates, schedules, evaluation, and what is done about alarms."""
