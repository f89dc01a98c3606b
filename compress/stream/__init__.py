"""Answers over sliding windows of a stream, without computing everything anew."""
