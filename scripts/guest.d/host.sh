#!/busybox sh
# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=dash
# usage: /busybox sh /host.sh x86_64|xen|arm64
#
# Runs in the machine of scripts/guest: starts a guest under QEMU's KVM, balloons,
# plugs, swaps out and unplugs its memory, saves and restores it while it works (but not a
# Xen guest), and checks KVM's statistics before it is saved and at the end.  The output is
# the guest's console and, last, "figures:" and the statistics.
#
# Exit code: 0 if the guest works to its end and the statistics are as they should be.
guest=$1
/busybox mkdir -p /bin /mnt
/busybox --install -s /bin
export PATH=/bin

# show: what the guest said since the last time
shown=0
show() {
	size=$(stat -c %s /tmp/console)
	tail -c +$((shown + 1)) /tmp/console | head -c $((size - shown))
	shown=$size
}
die() {
	show
	tail -n 20 /tmp/answers
	# QEMU's prompt has no newline.
	printf '\nerror: %s\n' "$*"
	exit 1
}

# TCG's SVM does not intercept XSETBV: a guest with XSAVE would change the host's XCR0.
case $guest in
x86_64) machine='-M q35 -bios qboot.rom -cpu host,-svm,-xsave -accel kvm' ;;
xen)	machine='-M q35 -bios qboot.rom -cpu host,-svm,-xsave -accel kvm,xen-version=0x40011,kernel-irqchip=split' ;;
arm64)	machine='-M virt,gic-version=3,its=on -cpu host -accel kvm' ;;
*)	die "no such guest: $guest" ;;
esac
# moved: statistics that have to be above zero.  still: those that have to be zero.  few:
# those that may be at most a twentieth of the hits.
case $guest in
arm64)	qemu=qemu-system-aarch64 append='console=ttyAMA0'
	moved='exits lpis lpi_translation_hits memslot_grace_periods' still='' few='lpi_translation_misses lpi_inatomic_fallbacks' ;;
*)	qemu=qemu-system-x86_64 append='console=ttyS0 no_timer_check'
	moved='exits irq_injections pfncache_refresh memslot_grace_periods' still='pfncache_overflow' few='' ;;
esac

[ -d /mnt/usr ] || {
	mount -t ext2 -o ro /dev/vda /mnt || die "no root file system on /dev/vda"
	for d in dev proc sys tmp; do
		mount -o bind /$d /mnt/$d
	done
	mount -o bind / /mnt/mnt
	# What the guest's memory is swapped out to.
	{ mkswap /dev/vdb && swapon /dev/vdb; } > /dev/null || die "no swap on /dev/vdb"
	echo +memory > /sys/fs/cgroup/cgroup.subtree_control
	mkdir /sys/fs/cgroup/guest
}

# This shell controls the guest via the input of its console and via QEMU's monitor.  Both
# are FIFOs that this shell keeps open.
rm -f /tmp/*
mkfifo /tmp/input /tmp/commands
exec 3<> /tmp/input 4<> /tmp/commands
touch /tmp/console /tmp/answers
dd if=/dev/zero of=/tmp/disk bs=1M count=1 2> /dev/null
trap 'kill $pid 2> /dev/null' EXIT

# start [OPTION...]: QEMU, with further options, in a cgroup of its own
start() {
	# shellcheck disable=SC2016,SC2086 # expanded there; words, by intent
	sh -c 'echo 0 > /sys/fs/cgroup/guest/cgroup.procs && exec "$@"' start \
		chroot /mnt /usr/bin/$qemu $machine -smp 2 -m 256,maxmem=1G -nodefaults -nic none -display none -no-reboot \
		-kernel /mnt/guest/kernel -initrd /mnt/guest/initrd \
		-append "$append loglevel=4 memhp_default_state=online_movable panic=-1 panic_on_warn=1 kunit.enable=0 guest=$guest" \
		-chardev file,id=console,path=/tmp/console,append=on,input-path=/tmp/input -serial chardev:console \
		-object iothread,id=io -drive if=none,id=disk,file=/tmp/disk,format=raw \
		-device virtio-blk-pci,drive=disk,iothread=io -device virtio-rng-pci -device virtio-balloon-pci,id=balloon \
		-object memory-backend-ram,id=ram,size=512M,reserve=off \
		-device virtio-mem-pci,id=plug,memdev=ram,dynamic-memslots=on \
		-monitor stdio "$@" < /tmp/commands >> /tmp/answers 2>&1 &
	pid=$!
}

# alive: show, and see that nothing went wrong
alive() {
	show
	kill -0 $pid 2> /dev/null || {
		wait $pid
		die "QEMU has stopped, exit code $?"
	}
	! grep -q 'guest: failed' /tmp/console || die "the guest says that it failed"
	! grep -qi 'error' /tmp/answers || die "QEMU says that it failed"
	usleep 100000
}
# hear LINE: wait until the guest says so
hear() {
	until grep -q "guest: $1" /tmp/console; do
		alive
	done
}
# next N: wait for N more rounds
next() { hear "round $(($(grep -c 'guest: round' /tmp/console) + $1)):"; }
# ask COMMAND PATTERN: repeat a command to the monitor until the answer has it
ask() {
	until grep -q "$2" /tmp/answers; do
		echo "$1" >&4
		alive
	done
}

value() { cat /sys/kernel/debug/kvm/$pid-*/"$1" 2> /dev/null || echo missing; }
bad=''
# judge WHEN: look at the statistics, add to figures and bad
judge() {
	for s in $moved $still $few; do
		v=$(value "$s")
		figures="$figures $s=$v"
		case " $moved " in *" $s "*) [ "$v" -gt 0 ] || bad="$bad $s is $v $1;" ;; esac
		case " $still " in *" $s "*) [ "$v" -eq 0 ] || bad="$bad $s is $v $1;" ;; esac
		case " $few " in *" $s "*)
			[ "$v" -le $(($(value lpi_translation_hits) / 20)) ] || bad="$bad $s is $v $1;" ;;
		esac
	done
}

# plug MIB: set how much of the pluggable memory the guest has
plug() {
	: > /tmp/answers
	echo "qom-set plug requested-size $1M" >&4
	ask 'info memory-devices' "^  size: $(($1 * 1048576))[^0-9]*$"
	next 1
}

start
next 1
for mib in 160 256; do
	echo "balloon $mib" >&4
	ask 'info balloon' "actual=$mib"
	next 1
done
plug 512
ins=$(value page_in)
# Writing fails with EAGAIN if less was reclaimed; the amount is checked below.
echo 128M > /sys/fs/cgroup/guest/memory.reclaim 2> /dev/null || :
out=$(($(cat /sys/fs/cgroup/guest/memory.swap.current) / 1048576))
next 1
ins=$(($(value page_in) - ins))
figures=" swapped out $out MiB, page_in=$ins"
{ [ $out -gt 0 ] && [ $ins -gt 0 ]; } || die "swapped out $out MiB, brought in $ins pages, expected some"
# QEMU 10 does not migrate a Xen guest ("non-migratable device: xen_xenstore").
if [ "$guest" != xen ]; then
	judge 'before saving'
	: > /tmp/answers
	echo 'migrate_set_parameter downtime-limit 60000' >&4
	echo 'migrate -d file:/tmp/state' >&4
	ask 'info migrate' 'tatus: *completed'
	echo quit >&4
	wait $pid
	echo "saved, $(($(stat -c %s /tmp/state) / 1048576)) MiB"
	: > /tmp/answers
	start -incoming file:/tmp/state
	ask 'info status' 'VM status: running'
	figures="$figures; restored:"
fi
plug 0
next 3
echo >&3
hear 'done'
judge 'at the end'
echo >&3
wait $pid || die "QEMU ends with exit code $?"

show
echo "figures:$figures"
[ -z "$bad" ] || die "$bad"
