"""Cleaning a corpus: languages, rules, personal data, duplicates, a report; by datatrove's executors."""
