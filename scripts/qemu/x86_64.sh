# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash disable=SC2034,SC2054,SC2100
#
# The x86-64 test machine: q35 with nested SVM.  TCG has no VMX.
#
# Tests of KVM's clocks need the TSC as clock source.  The TSC of TCG is good enough, but
# the kernel does not know that: tsc=reliable.  Its rate is measured twice during boot, and
# built-in KVM keeps the first value, which is less exact: kvm.tsc_tolerance_ppm makes KVM
# accept the difference.  The kernel's own test of the timer interrupt fails when the host
# is busy: no_timer_check.
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
