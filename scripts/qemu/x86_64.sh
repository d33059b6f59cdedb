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
# QEMU's SVM (7.2, 10.0) clears one of a CPU's pending requests in each #VMEXIT, not
# atomically, and so now and then loses the one for an interrupt that comes in that
# moment.  It stays pending in the local APIC, where the CPU looks when the next
# interrupt comes.  A one-shot timer or an IPI may be the last one for ever; the
# periodic timer brings the CPU back at its next tick.
qemu=qemu-system-x86_64
machine=(-M q35 -cpu max -bios qboot.rom)
console=ttyS0
append="no_timer_check tsc=reliable kvm.tsc_tolerance_ppm=5000 nohz=off highres=off"
# KVM with shadow paging; CPUs that do not halt when idle
append_shadow=kvm_amd.npt=0
append_poll=idle=poll
kernel_make=(ARCH=x86_64)
kernel_cc=gcc
kernel_image=arch/x86/boot/bzImage
