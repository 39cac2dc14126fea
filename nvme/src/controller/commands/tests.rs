//! Format, log pages and limits against a controller that only notes what it is told.

use super::*;
use crate::controller::{ControllerOptions, Feature, FormatError, FormatOptions, Keeper, Persistence};
use crate::identity::NamespaceProblem;
use crate::queue_pair::QueueOptions;
use crate::transport::Timing;
use crate::transport::fake::{Fake, Script};
use nvme_spec::AdminOpcode;
use nvme_spec::feature::FeatureId;
use nvme_spec::format::SecureErase;
use nvme_spec::identify::{Fna, Oacs};
use std::sync::Arc;
use std::time::Duration;

fn bring_up(script: Script) -> (Arc<Fake>, Arc<Controller>) {
    let fake = Fake::new(script);
    let (transport, timing) = (Arc::clone(&fake), Arc::clone(&fake.timing));
    let options = ControllerOptions { keeper: Keeper::Polled, ..ControllerOptions::default() };
    let controller = Controller::bring_up(transport, timing, &options).unwrap();
    (fake, controller)
}

/// A controller with two namespaces that can be formatted with 512-byte (index 1) and unusable (2, 3) blocks.
fn formattable() -> Script {
    let mut script = Script::default();
    script.controller.oacs.set(Oacs::FORMAT.bits());
    script.namespace_ids = vec![1, 3];
    script.namespace.nlbaf_z = 3;
    script.namespace.lbaf[1].lbads = 9;
    script.namespace.lbaf[2].lbads = 9;
    script.namespace.lbaf[2].ms.set(8);
    script
}

fn queue_on(nsid: u32) -> QueueOptions {
    QueueOptions {
        namespace: Some(NamespaceId::new(nsid)),
        depth: 4,
        pool_bytes: 1 << 20,
        ..QueueOptions::default()
    }
}

fn with_format(lba_format: u8) -> FormatOptions {
    FormatOptions { lba_format, ..FormatOptions::default() }
}

fn formats_sent(fake: &Fake) -> usize {
    fake.admin_opcodes().iter().filter(|&&opcode| opcode == AdminOpcode::FORMAT_NVM).count()
}

#[test]
fn a_namespace_is_formatted_and_read_again() {
    let (fake, controller) = bring_up(formattable());
    let nsid = NamespaceId::new(3);
    assert_eq!(controller.namespace(nsid).unwrap().lba_size(), 4096);
    fake.script().namespace.flbas = 1;
    controller.format_nvm(nsid, &with_format(1)).unwrap();
    assert_eq!(controller.namespace(nsid).unwrap().lba_size(), 512);
    assert_eq!(formats_sent(&fake), 1);
}

#[test]
fn a_namespace_in_use_is_not_formatted() {
    let (fake, controller) = bring_up(formattable());
    let queue = controller.create_queue(&queue_on(3)).unwrap();
    let format = |nsid| controller.format_nvm(NamespaceId::new(nsid), &with_format(1));
    assert_eq!(format(3), Err(FormatError::InUse(3)));
    assert_eq!(formats_sent(&fake), 0);
    assert_eq!(format(1), Ok(()), "nobody uses it");
    drop(queue);
    assert_eq!(format(3), Ok(()));
}

#[test]
fn a_format_that_touches_every_namespace_waits_for_all_of_them() {
    let mut script = formattable();
    script.controller.fna = (Fna::ERASE_ALL | Fna::CRYPTOGRAPHIC_ERASE).bits();
    let (_, controller) = bring_up(script);
    let _queue = controller.create_queue(&queue_on(3)).unwrap();
    let erase = FormatOptions { secure_erase: SecureErase::CRYPTOGRAPHIC, ..with_format(1) };
    assert_eq!(controller.format_nvm(NamespaceId::new(1), &erase), Err(FormatError::InUse(3)));
    assert_eq!(controller.format_nvm(NamespaceId::new(1), &with_format(1)), Ok(()));
}

#[test]
fn formats_that_cannot_be_are_refused_before_anything_is_sent() {
    let (fake, controller) = bring_up(formattable());
    let format = |nsid, options| controller.format_nvm(NamespaceId::new(nsid), &options).unwrap_err();
    assert_eq!(format(2, with_format(0)), FormatError::NoSuchNamespace(2));
    assert_eq!(format(u32::MAX, with_format(0)), FormatError::NoSuchNamespace(u32::MAX));
    assert_eq!(format(1, with_format(4)), FormatError::NoSuchFormat { nsid: 1, index: 4, formats: 4 });
    let metadata = FormatError::UselessFormat { index: 2, problem: NamespaceProblem::Metadata(8) };
    assert_eq!(format(1, with_format(2)), metadata);
    let unused = FormatError::UselessFormat { index: 3, problem: NamespaceProblem::BlockSize(0) };
    assert_eq!(format(1, with_format(3)), unused);
    let erase = |secure_erase| FormatOptions { secure_erase, ..with_format(1) };
    let unsupported = format(1, erase(SecureErase::CRYPTOGRAPHIC));
    assert!(matches!(unsupported, FormatError::Command(CommandError::Unsupported(_))), "{unsupported}");
    let unknown = format(1, erase(SecureErase(5)));
    assert!(matches!(unknown, FormatError::Command(CommandError::Argument(_))), "{unknown}");
    assert_eq!(formats_sent(&fake), 0);

    let (fake, controller) = bring_up(Script::default());
    assert!(controller.format_nvm(NamespaceId::new(1), &with_format(0)).is_err(), "not in OACS");
    assert_eq!(formats_sent(&fake), 0);
}

#[test]
fn a_refused_format_is_an_error_and_the_controller_goes_on() {
    let mut script = formattable();
    script.refuse.push(AdminOpcode::FORMAT_NVM);
    let (_, controller) = bring_up(script);
    let error = controller.format_nvm(NamespaceId::new(1), &with_format(1)).unwrap_err();
    assert!(matches!(error, FormatError::Command(CommandError::Admin(AdminError::Status { .. }))), "{error}");
    assert!(controller.create_queue(&queue_on(1)).is_ok());
}

#[test]
fn a_format_is_given_its_own_time() {
    let mut script = formattable();
    script.swallow.push(AdminOpcode::FORMAT_NVM);
    let (fake, controller) = bring_up(script);
    let before = fake.timing.now();
    let options = FormatOptions { timeout: Duration::from_secs(400), ..with_format(1) };
    let error = controller.format_nvm(NamespaceId::new(1), &options).unwrap_err();
    assert!(matches!(error, FormatError::Command(CommandError::Admin(AdminError::Failed(_)))), "{error}");
    let taken = fake.timing.now().duration_since(before);
    assert!(taken >= Duration::from_secs(400) && taken < Duration::from_secs(500), "{taken:?}");
}

#[test]
fn long_logs_are_read_in_pieces_and_only_where_offsets_work() {
    let (fake, controller) = bring_up(Script::default());
    let mut data = vec![0xff; 10_000];
    let read = |page, offset, data: &mut [u8]| {
        controller.read_log(LogPageId(page), NamespaceId::BROADCAST, offset, data)
    };
    let unsupported = Err(CommandError::Unsupported("offsets in log pages (LPA)"));
    assert_eq!(read(0xc0, 0, &mut data), unsupported);
    assert_eq!(read(0xc0, 4, &mut data[..4]), unsupported);
    assert_eq!(read(0xc0, 0, &mut data[..4096]), Ok(()));
    assert!(data[..4096].iter().all(|&byte| byte == 0));
    assert!(matches!(read(0xc0, 0, &mut data[..5]), Err(CommandError::Argument(_))));
    assert_eq!(read(0xc0, 0, &mut []), Ok(()), "nothing to read");
    drop((fake, controller));

    let mut script = Script::default();
    script.controller.lpa = Lpa::EXTENDED_DATA.bits();
    let (fake, controller) = bring_up(script);
    controller.read_log(LogPageId(0xc0), NamespaceId::BROADCAST, 64, &mut data).unwrap();
    let pieces: Vec<_> = fake.log_pages_read().iter().map(|page| (page.offset, page.dwords_z)).collect();
    assert_eq!(pieces, [(64, 1023), (64 + 4096, 1023), (64 + 8192, (10_000 - 8192) / 4 - 1)]);
    assert!(fake.log_pages_read().iter().all(|page| page.retain_event));
    let wraps = controller.read_log(LogPageId(0xc0), NamespaceId::BROADCAST, u64::MAX - 3, &mut data);
    assert!(matches!(wraps, Err(CommandError::Argument(_))));
}

#[test]
fn features_of_the_driver_are_not_given_away() {
    let (_, controller) = bring_up(Script::default());
    for id in [FeatureId::NUMBER_OF_QUEUES, FeatureId::HOST_MEMORY_BUFFER] {
        let set = controller.set_feature(Feature::of_controller(id), Persistence::UntilReset, &[]);
        assert!(matches!(set, Err(CommandError::Argument(_))));
    }
    let feature = Feature::of_controller(FeatureId::ARBITRATION);
    let saved = controller.set_feature(feature, Persistence::Saved, &[]);
    assert!(matches!(saved, Err(CommandError::Unsupported(_))), "ONCS says that nothing can be saved");
}

#[test]
fn limits_of_the_command_set_are_asked_for_from_2_0_on() {
    let mut script = Script::default();
    (script.limits.vsl, script.limits.wzsl) = (3, 255);
    let (_, controller) = bring_up(script.clone());
    assert_eq!((controller.info().max_verify, controller.info().max_zeroes), (None, None));
    script.version = Version::V2_0;
    let (_, controller) = bring_up(script);
    assert_eq!((controller.info().max_verify, controller.info().max_zeroes), (Some(32 << 10), None));
}

#[test]
fn identifiers_of_a_wrong_length_are_passed_on_as_they_are() {
    let uid = |kind, id: &[u8]| namespace_uid(kind, id);
    assert_eq!(uid(NamespaceIdType::EUI64, &[7; 8]), NamespaceUid::Eui64([7; 8]));
    assert_eq!(uid(NamespaceIdType::UUID, &[7; 16]), NamespaceUid::Uuid([7; 16]));
    assert_eq!(uid(NamespaceIdType::CSI, &[2]), NamespaceUid::CommandSet(2));
    let odd = NamespaceUid::Other(NamespaceIdType::NGUID, vec![1, 2]);
    assert_eq!(uid(NamespaceIdType::NGUID, &[1, 2]), odd);
    assert_eq!(uid(NamespaceIdType(9), &[1]), NamespaceUid::Other(NamespaceIdType(9), vec![1]));
}
