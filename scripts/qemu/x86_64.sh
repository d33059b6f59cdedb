# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash disable=SC2034,SC2054,SC2100
#
# The x86-64 test machine: q35 with nested SVM.  TCG has no VMX.
#
# Tests of KVM's clocks need the TSC as clock source.  TCG's is good enough, but
# not marked so.  Its rate is measured twice during boot, and built-in KVM keeps
# the first, rougher one: the tolerance keeps it from calling the rate wrong.
# The kernel's own test of the timer interrupt gives up when the host is busy.
#
# nohz=off highres=off keep a periodic timer, because QEMU's SVM can lose an interrupt:
# see "An interrupt is lost" in Documentation/series/emulator.rst.
qemu=qemu-system-x86_64
qemu_machine=(-M q35 -cpu max -bios qboot.rom)
console=ttyS0
append="no_timer_check tsc=reliable kvm.tsc_tolerance_ppm=5000 nohz=off highres=off"
kernel_make=(ARCH=x86_64)
kernel_cc=gcc
kernel_image=arch/x86/boot/bzImage
