"""Scores by lm-evaluation-harness.

tokenizer_check, chat_template      what has to be right, and the same for two models, before one is scored
local_tasks, tasks/                 tasks of a folder's questions and texts; a suite of the harness's own
harness                             one model scored, task by task
answer_cache, model_identity        answers that are kept, and which model they are of
"""
