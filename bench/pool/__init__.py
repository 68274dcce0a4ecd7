"""`python -m bench pool`: how large should a pool be, for this server and this work?"""
