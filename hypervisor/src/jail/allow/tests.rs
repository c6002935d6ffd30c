use super::*;

#[test]
fn what_leads_out_of_the_jail_is_on_no_list() {
    let denied = [
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_move_mount,
        libc::SYS_open_tree,
        libc::SYS_fsopen,
        libc::SYS_mount_setattr,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_setns,
        libc::SYS_fork,
        libc::SYS_vfork,
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_socket,
        libc::SYS_socketpair,
        libc::SYS_connect,
        libc::SYS_io_uring_setup,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_bpf,
        libc::SYS_keyctl,
        libc::SYS_add_key,
        libc::SYS_open_by_handle_at,
        libc::SYS_userfaultfd,
        libc::SYS_perf_event_open,
        libc::SYS_memfd_create,
        libc::SYS_pidfd_open,
        libc::SYS_pidfd_getfd,
        libc::SYS_prlimit64,
        libc::SYS_epoll_create,
        libc::SYS_setuid,
        libc::SYS_setreuid,
        libc::SYS_kill,
        libc::SYS_init_module,
        libc::SYS_kexec_load,
    ];
    for kind in KINDS {
        for call in system_calls(kind) {
            assert!(!denied.contains(&call.number), "{kind:?}: {}", call.name);
            if call.number == libc::SYS_unshare {
                assert_eq!(kind, ThreadKind::Fs);
                assert!(matches!(call.when, When::OneOf(0, [0x200])), "no namespace");
            }
        }
    }
}

#[test]
fn who_has_helpers_starts_threads_like_itself_and_nothing_starts_a_process_or_a_namespace() {
    let starts = [libc::SYS_clone, libc::SYS_clone3, libc::SYS_prctl];
    // To start one of another kind.
    let confines = [libc::SYS_seccomp, libc::SYS_epoll_create1];
    for kind in KINDS {
        let has =
            |calls: &[libc::c_long]| system_calls(kind).any(|call| calls.contains(&call.number));
        assert_eq!(
            has(&starts),
            kind.is_main() || kind.has_helpers(),
            "{kind:?}"
        );
        assert_eq!(has(&confines), kind.is_main(), "{kind:?}");
    }
    let spaces = libc::CLONE_NEWUSER
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    for flags in NEW_THREAD {
        assert_eq!(flags & spaces.cast_unsigned(), 0);
        assert_ne!(flags & libc::CLONE_THREAD.cast_unsigned(), 0);
    }
    for call in system_calls(ThreadKind::Main).filter(|call| call.number == libc::SYS_prctl) {
        assert!(matches!(call.when, When::OneOf(0, [15] | [38])));
    }
}

#[test]
fn a_call_of_two_lists_is_conditional_in_both_or_in_neither() {
    for kind in KINDS {
        for call in system_calls(kind) {
            let always = |call: &&Allowed| matches!(call.when, When::Always);
            let same = system_calls(kind).filter(|other| other.number == call.number);
            let free = same.filter(always).count();
            let all = system_calls(kind)
                .filter(|other| other.number == call.number)
                .count();
            assert!(free == 0 || free == all, "{kind:?}: {}", call.name);
        }
    }
}

#[test]
fn only_cpu_threads_run_the_guest_and_only_the_file_server_opens_files() {
    let can = |kind, number, command: u32| {
        system_calls(kind).any(|call| {
            call.number == number
                && match call.when {
                    When::OneOf(1, commands) => commands.contains(&command),
                    _ => true,
                }
        })
    };
    for kind in KINDS {
        let captured = kind == ThreadKind::CapturedVcpu;
        let debugged = matches!(
            kind,
            ThreadKind::DebuggedVcpu | ThreadKind::MainWithDebugger
        );
        let runs = kind == ThreadKind::Vcpu || captured || debugged || kind.gives_cpus();
        assert_eq!(can(kind, libc::SYS_ioctl, 0xae80), runs);
        assert_eq!(can(kind, libc::SYS_ioctl, DEBUG_IOCTL[0]), debugged);
        for request in NEW_VCPU_IOCTL
            .into_iter()
            .filter(|one| !KVM_VCPU.contains(one) && !CAPTURE_IOCTL.contains(one))
        {
            assert_eq!(can(kind, libc::SYS_ioctl, request), kind.gives_cpus());
        }
        for request in CAPTURE_IOCTL
            .into_iter()
            .filter(|one| !KVM_VCPU.contains(one) && !NEW_VCPU_IOCTL.contains(one))
        {
            assert_eq!(can(kind, libc::SYS_ioctl, request), captured);
        }
        assert_eq!(can(kind, libc::SYS_openat, 0), kind == ThreadKind::Fs);
        let devices = kind == ThreadKind::Vfio || kind.gives_devices();
        for request in kernel::REQUESTS.into_iter().chain(space::REQUESTS) {
            assert_eq!(can(kind, libc::SYS_ioctl, request), devices, "{kind:?}");
        }
        for request in VHOST_IOCTL {
            let serves = kind == ThreadKind::VhostWorker;
            assert_eq!(can(kind, libc::SYS_ioctl, request), serves, "{kind:?}");
        }
        assert_eq!(can(kind, libc::SYS_setresuid, 0), kind == ThreadKind::Fs);
        for call in system_calls(kind).filter(|call| call.number == libc::SYS_setresuid) {
            assert!(matches!(call.when, When::OneOf(0, [u32::MAX])));
        }
    }
}
