# Every target only calls tasks.py; `python tasks.py TASK` does the same without make.
PYTHON ?= python3
.DEFAULT_GOAL := help
.PHONY: help lab test install build doctor format clean

help:    ; @$(PYTHON) tasks.py --help
lab:     ; @$(PYTHON) tasks.py lab $(ARGS)
test:    ; @$(PYTHON) tasks.py test $(ARGS)
install: ; @$(PYTHON) tasks.py install $(ARGS)
build:   ; @$(PYTHON) tasks.py build $(ARGS)
doctor:  ; @$(PYTHON) tasks.py doctor $(ARGS)
format:  ; @$(PYTHON) tasks.py format $(ARGS)
clean:   ; @$(PYTHON) tasks.py clean $(ARGS)
