"""The evaluation suite: models on many tasks, in Indonesian, with intervals and paired differences.

`tasks` names the tasks and reads their data, `scoring` compares vectors, `suite` runs models on tasks and reports.
"""
