# Every training and evaluation behind the tables, as make targets. From the repository's root:
#   make -f study/study.mk vte                     VTE's Tables 1 to 3: CIFAR-10, the paper's settings, three seeds
#   make -f study/study.mk vte DATA=stl10          its Table 4
#   make -f study/study.mk stl DATA=stl10          STL, its SimCLR base, with AugMix, labels in place of its codes
#   make -f study/study.mk stl SCALE=small DATA=data/cifar10-jpg SEEDS=0 \
#       METHODS="stl equi without_inv without_equi without_trans"      its ablations, which must be asked for
#   make -f study/study.mk vte SCALE=small DATA=data/cifar10-jpg SEEDS="0 1"
#   make -f study/study.mk vte-tables SCALE=small  into results/ and the pages what is finished so far
#
# To stop: Ctrl-C, SIGTERM, or `timeout 9m make ...`. To go on: the same command. A finished part has its mark: a
# training NAME.done, an evaluation its NAME-KIND.json. No part with a mark is made again, whatever its date. A training
# without one goes on after the last epoch it saved. To make a part again, remove its mark, checkpoint and log, and the
# marks of all that builds on it. What a part says is in its .out.
# To go on elsewhere: copy the study's folder, $(RUNS)/<study>. Of the checkpoints it needs only those on which something
# unfinished builds.
# Several at once: `make -j2 -k`. -k goes on with all that does not follow from a part that failed. Share the cores out:
# OMP_NUM_THREADS=<cores / jobs>. One make a folder at a time. On an H200 -j3 suits vte: with CUDA graphs one training at
# a time is as fast as three, and an evaluation is mostly work of the processor. Trainings of 200
# epochs took 3.3 to 6.3 minutes there, side by side.
# A seed beside those that results/ has: the same DATA, SEEDS=1, then study/parts.py collect $(RUNS)/<study> --add.

# full: the papers' settings, on a GPU. small: on two CPU cores, vte in 84 minutes and the CONTROLS, stl with three seeds
# and the ablations in 140 (OMP_NUM_THREADS=1 make -j2). paired: ours, phase two on a trained and on an untrained phase
# one, five seeds at 16 x 16 with the fast recipe. tiny: to see it work.
SCALE ?= full
# cifar10, stl10, digits (to see it work), or a folder that holds CIFAR-10 as files; DATA_DIR: where the first two go.
DATA ?= cifar10
DATA_DIR ?= data
# All, but for the ablations, unless some are named: METHODS="pt vte_ba". What these build on is made too.
METHODS ?=
SEEDS ?= $(SEEDS.$(SCALE))
DEVICE ?= auto
RUNS ?= runs/study
PYTHON ?= $(or $(wildcard .venv/bin/python),python3)
# Memory in huge pages, where Linux has them for who asks: phase one is 1.5 times as fast on a CPU.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

# Methods: script and variation, what each builds on, which settings each is trained with.
SCRIPT.avt = avt.py
SCRIPT.pt = predictive_transform.py
SCRIPT.vte_ba = vte_ba.py
SCRIPT.vte_infonce1 = vte_infonce.py --critic separated
SCRIPT.vte_infonce2 = vte_infonce.py --critic concatenated
SCRIPT.random_ba = vte_ba.py --phase-one random
SCRIPT.random_infonce1 = vte_infonce.py --critic separated --phase-one random
SCRIPT.random_infonce2 = vte_infonce.py --critic concatenated --phase-one random
SCRIPT.steerable = vte_ba.py --steerable
SCRIPT.mean_target = vte_ba.py --mean-target
SCRIPT.stl = stl.py
SCRIPT.simclr = stl.py --equi 0 --trans 0 --batch independent
SCRIPT.augmix = stl.py --augmix
# Labels need no pairs, and their papers have none, but batches decide as much as codes do: these two have STL's pairs,
# and so has inv, SimCLR's loss on them. All else is then equal.
SCRIPT.labels = stl.py --code labels
SCRIPT.predicted = stl.py --code predicted
SCRIPT.inv = stl.py --equi 0 --trans 0
SCRIPT.equi = stl.py --inv 0 --trans 0
SCRIPT.without_inv = stl.py --inv 0
SCRIPT.without_equi = stl.py --equi 0
SCRIPT.without_trans = stl.py --trans 0
ABLATIONS = equi without_inv without_equi without_trans
PHASE_TWO = vte_ba vte_infonce1 vte_infonce2 steerable mean_target
CONTROLS = random_ba random_infonce1 random_infonce2
before = $(if $(filter $(PHASE_TWO),$(1)),pt)
group = $(if $(filter $(PHASE_TWO) $(CONTROLS),$(1)),phase_two,$(if $(filter $(ALL.stl),$(1)),stl,predictors))

# Families: methods and classifiers.
ALL.vte = avt pt $(PHASE_TWO) $(CONTROLS)
ALL.stl = stl simclr inv predicted labels augmix $(ABLATIONS)
CLASSIFIERS.vte = mlp knn logistic
CLASSIFIERS.stl = knn linear

# Scales. Where nothing is said, the scripts' defaults are the papers' values.
SEEDS.full = 0 1 2
SAVE_EVERY.full = 5
TRAIN.full.predictors = $(if $(filter cpu,$(DEVICE)),,--compile cudagraphs)
TRAIN.full.phase_two = $(TRAIN.full.predictors)
LABELS.full = $(if $(filter stl10,$(DATA)),--train-sizes 5000)
EQUIVARIANCE.full.stl = --transformations crop+colour crop colour projective
LEFT_OUT.full = $(ABLATIONS)

SEEDS.small = 0 1
LIMIT.small.vte = 10000
LIMIT.small.stl = 5000
SIZE.small.stl = 16
TRAIN.small.predictors = --limit $(LIMIT) --epochs 14 --batch-size 64 --lr 5e-4
TRAIN.small.phase_two = --limit $(LIMIT) --epochs 8 --batch-size 128 --lr 5e-4
TRAIN.small.stl = --encoder nin --image-size $(SIZE) --limit $(LIMIT) --epochs 6 --batch-size 128
LABELS.small = --train-sizes 5000 500
EQUIVARIANCE.small.vte = --images 100 --pairs 2000
EQUIVARIANCE.small.stl = --transformations crop+colour projective --images 100 --pairs 2000
LEFT_OUT.small = steerable mean_target $(ABLATIONS)

SEEDS.paired = 0 1 2 3 4
SIZE.paired.vte = 16
LIMIT.paired.vte = 19200
TRAIN.paired.predictors = --image-size $(SIZE) --limit $(LIMIT) --epochs 2 --batch-size 64 --recipe fast
TRAIN.paired.phase_two = --image-size $(SIZE) --limit $(LIMIT) --epochs 1 --batch-size 64 --recipe fast
LABELS.paired = --classifiers knn logistic --train-sizes 5000 --features mu
EQUIVARIANCE.paired.vte = --images 100 --pairs 2000
LEFT_OUT.paired = avt vte_infonce2 random_infonce2 steerable mean_target

SEEDS.tiny = 0 1
LIMIT.tiny.vte = 128
LIMIT.tiny.stl = 64
TRAIN.tiny.predictors = --limit $(LIMIT) --epochs 2 --batch-size 64
TRAIN.tiny.phase_two = --limit $(LIMIT) --epochs 1 --batch-size 64
TRAIN.tiny.stl = --encoder nin --limit $(LIMIT) --epochs 1 --batch-size 32
LABELS.tiny = --train-sizes 100 20
EQUIVARIANCE.tiny.vte = --images 20 --per-image 12 --pairs 50
EQUIVARIANCE.tiny.stl = --transformations crop+colour $(EQUIVARIANCE.tiny.vte)
LEFT_OUT.tiny = inv $(ABLATIONS)

# The study that is asked for, its folder, and its parts: FOLDER/seed0/pt.done, FOLDER/seed0/pt-labels.json, ...
FAMILY := $(if $(filter stl%,$(MAKECMDGOALS)),stl,vte)
LIMIT = $(LIMIT.$(SCALE).$(FAMILY))
SIZE = $(SIZE.$(SCALE).$(FAMILY))
NAME := $(FAMILY:vte=)$(if $(filter stl,$(FAMILY)),-)$(or $(filter stl10 digits,$(DATA)),cifar10)-$(SCALE)
FOLDER := $(RUNS)/$(NAME:-full=)
WANTED := $(or $(METHODS),$(filter-out $(LEFT_OUT.$(SCALE)),$(ALL.$(FAMILY))))
CHOSEN := $(filter $(WANTED) $(foreach method,$(WANTED),$(call before,$(method))),$(ALL.$(FAMILY)))
# The baselines, an untrained encoder and raw pixels, take from one checkpoint which encoder it is.
LIKE := $(firstword $(filter pt,$(CHOSEN)) $(CHOSEN))
KINDS := $(if $(filter full,$(SCALE)),$(CLASSIFIERS.$(FAMILY):%=labels-%),labels) equivariance
ifeq ($(FAMILY) $(DATA),stl stl10)
KINDS += transfer
endif
of_seed = $(addprefix $(FOLDER)/seed$(1)/,$(2))
TRAININGS := $(foreach seed,$(SEEDS),$(call of_seed,$(seed),$(CHOSEN:%=%.done)))
EVALUATIONS := $(foreach kind,$(KINDS),$(TRAININGS:.done=-$(kind).json))
EVALUATIONS += $(foreach seed,$(SEEDS),$(call of_seed,$(seed),$(KINDS:%=baselines-%.json)))
PARTS := $(foreach seed,$(SEEDS),$(filter $(FOLDER)/seed$(seed)/%,$(TRAININGS) $(EVALUATIONS)))
MISSING := $(filter-out $(wildcard $(PARTS)),$(PARTS))

$(foreach method,$(filter-out $(ALL.$(FAMILY)),$(METHODS)),$(error METHODS: $(method) is none of $(ALL.$(FAMILY))))
$(if $(filter full small paired tiny,$(SCALE)),,$(error SCALE: $(SCALE) is none of full small paired tiny))
$(if $(filter stl-paired,$(FAMILY)-$(SCALE)),$(error SCALE: paired is of vte alone))

.PHONY: help vte stl vte-tables stl-tables data
.DELETE_ON_ERROR:
.SECONDEXPANSION:

help:
	@sed -n '/^$$/q; s/^# \?//p' $(firstword $(MAKEFILE_LIST))

vte stl: $(PARTS)
	$(PYTHON) study/parts.py collect $(FOLDER)

vte-tables stl-tables:
	$(PYTHON) study/parts.py collect $(FOLDER)

# Downloads, or decodes, once, before many processes would.
$(MISSING): | data
data:
	$(PYTHON) study/parts.py prepare $(FOLDER) --scale $(SCALE) --dataset '$(DATA)' --data-dir '$(DATA_DIR)' \
	    $(addprefix --limit ,$(LIMIT)) $(addprefix --image-size ,$(SIZE))

# What the target of a rule is: seed0/vte_ba-labels-knn.json has the name vte_ba and the kind labels-knn. All that parts
# need stands behind |: it has to be there, and its date says nothing. exec, so that make's signals reach Python.
name = $(firstword $(subst -, ,$(basename $(notdir $@))))
kind = $(patsubst $(name)-%,%,$(basename $(notdir $@)))
seed = $(patsubst seed%,%,$(notdir $(@D)))
whose = $(if $(filter baselines,$(name)),$(LIKE),$(name))
where = --dataset '$(if $(filter transfer,$(kind)),cifar10,$(DATA))' --data-dir '$(DATA_DIR)' --device $(DEVICE)

$(TRAININGS): | $$(patsubst %,$$(@D)/%.done,$$(call before,$$(name)))
	@mkdir -p $(@D)
	exec $(PYTHON) $(firstword $(SCRIPT.$(name))) $(where) --output $(@:.done=.ckpt) --resume \
	    --save-every $(or $(SAVE_EVERY.$(SCALE)),1) $(patsubst %,--pretrained $(@D)/%.ckpt,$(call before,$(name))) \
	    $(wordlist 2,9,$(SCRIPT.$(name))) $(TRAIN.$(SCALE).$(call group,$(name))) --seed $(seed) >> $(basename $@).out
	@$(PYTHON) study/parts.py finish $(@:.done=.ckpt)

FLAGS.labels = $(if $(filter stl,$(FAMILY)),--classifiers $(CLASSIFIERS.stl)) $(LABELS.$(SCALE))
$(foreach c,$(CLASSIFIERS.$(FAMILY)),$(eval FLAGS.labels-$(c) = --classifiers $(c) $(LABELS.$(SCALE))))
FLAGS.transfer = --classifiers linear --train-sizes 50000
FLAGS.equivariance = $(EQUIVARIANCE.$(SCALE).$(FAMILY))

$(EVALUATIONS): | $$(@D)/$$(whose).done
	exec $(PYTHON) $(if $(filter equivariance,$(kind)),equivariance.py,probe.py) $(@D)/$(whose).ckpt $(where) \
	    --json $@ $(FLAGS.$(kind)) \
	    --rows $(if $(filter baselines,$(name)),baselines,checkpoints) --seed $(seed) >> $(basename $@).out
