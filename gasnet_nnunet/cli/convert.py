"""`gasnet-nnunet convert`: folders, tables, archives, public data and other datasets made into nnU-Net datasets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from gasnet_nnunet.errors import UserError

if TYPE_CHECKING:
    from gasnet_nnunet.dataset_conversion.conversion import Converted

DatasetId = Annotated[int, typer.Option("--id", help="nnU-Net's id of the new dataset, 1 to 999.")]
Name = Annotated[str, typer.Option(help="Its name: letters, digits, '_' and '-'.")]
Root = Annotated[Path, typer.Option("--in", metavar="FOLDER", help="Where the downloaded archives are unpacked.")]
Labelled = Annotated[
    list[str] | None,
    typer.Option(
        metavar="N | CASE ...",
        help="Cases whose masks are kept, all by default. The others become diseased, their masks put aside.",
    ),
]
Test = Annotated[
    list[str] | None, typer.Option(metavar="N | CASE ...", help="Cases kept out of training, none by default.")
]
Seed = Annotated[int, typer.Option(help="Decides which N cases are drawn.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a dataset of this id and name.")]
NumProcesses = Annotated[int, typer.Option(min=1, help="Cases read and written at a time.")]


def folders(
    dataset_id: DatasetId,
    name: Name,
    labelled: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="IMAGES MASKS", help="CTs with lesion masks; one is enough.")
    ] = None,
    healthy: Annotated[Path | None, typer.Option(metavar="IMAGES", help="CTs without lesions.")] = None,
    diseased: Annotated[
        Path | None, typer.Option(metavar="IMAGES", help="CTs of patients known to have the disease, without masks.")
    ] = None,
    test: Annotated[
        list[Path] | None,
        typer.Option(metavar="IMAGES [MASKS]", help="CTs kept out of training, with or without masks."),
    ] = None,
    lungs: Annotated[
        Path | None, typer.Option(metavar="MASKS", help="Lung masks of training cases, instead of computed ones.")
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Table (.csv, .xlsx) of cases, alone or beside the folders; columns: image, kind, mask, lungs, "
            "patient, case.",
        ),
    ] = None,
    rescale: Annotated[
        tuple[float, float, float, float] | None,
        typer.Option(metavar="LO HI HU_LO HU_HI", help="Map stored values LO..HI to HU, e.g. 0 255 -1250 250."),
    ] = None,
    overwrite: Overwrite = False,
    num_processes: NumProcesses = 2,
) -> None:
    """Make an nnU-Net dataset out of folders of CTs: NIfTI, anything else SimpleITK reads, or DICOM.

    A file is a case and its name the case's name; an image and its mask have the same name. DICOM: a folder for each
    case. Needed are --labelled and --healthy, or a --manifest. The dataset appears when all files were found sound.

    Raises:
        UserError: nnUNet_raw is not set, the id is taken, or files cannot be used.
    """
    from gasnet_nnunet.dataset_conversion.folders import convert_folders
    from gasnet_nnunet.dataset_conversion.sources import Rescaling

    if test and len(test) > 2:
        raise UserError(f"--test takes IMAGES [MASKS], one or two folders; found {len(test)}.")
    test_images, test_masks = [*(test or ()), None, None][:2]
    converted = convert_folders(
        dataset_id=dataset_id,
        name=name,
        labelled=labelled,
        healthy=healthy,
        diseased=diseased,
        test=test_images,
        test_masks=test_masks,
        lungs=lungs,
        manifest=manifest,
        rescaling=Rescaling(*rescale) if rescale else None,
        overwrite=overwrite,
        num_processes=num_processes,
        progress=True,
    )
    _tell(converted, dataset_id)


def covid19_ct_seg(
    dataset_id: DatasetId,
    name: Name,
    root: Root,
    labelled: Labelled = None,
    test: Test = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    num_processes: NumProcesses = 2,
) -> None:
    """Make an nnU-Net dataset of COVID-19-CT-Seg (Zenodo 3757476, or its copy on Kaggle): 20 CTs with masks.

    FOLDER holds COVID-19-CT-Seg_20cases, Infection_Mask and Lung_Mask, or ct_scans, infection_mask and lung_mask. The
    ten radiopaedia cases, published in grey levels, are mapped back to HU.

    Raises:
        UserError: nnUNet_raw is not set, the id is taken, the layout is another one, or files cannot be used.
    """
    from gasnet_nnunet.dataset_conversion.covid19_ct_seg import convert_covid19_ct_seg
    from gasnet_nnunet.dataset_conversion.public import Output, Roles

    output = Output(dataset_id, name, overwrite, num_processes, progress=True)
    _tell(convert_covid19_ct_seg(root, output, Roles.parse(labelled, test, seed)), dataset_id)


def medseg(
    dataset_id: DatasetId,
    name: Name,
    root: Root,
    labelled: Labelled = None,
    test: Test = None,
    seed: Seed = 0,
    classes_apart: Annotated[
        bool,
        typer.Option(
            "--classes-apart",
            help="Keep ground glass, consolidation and effusion apart; else the first two are one class.",
        ),
    ] = False,
    overwrite: Overwrite = False,
    num_processes: NumProcesses = 2,
) -> None:
    """Make an nnU-Net dataset of MedSeg's nine CTs from Radiopaedia.

    FOLDER holds rp_im, rp_msk and rp_lung_msk.

    Raises:
        UserError: nnUNet_raw is not set, the id is taken, the layout is another one, or files cannot be used.
    """
    from gasnet_nnunet.dataset_conversion.medseg import convert_medseg
    from gasnet_nnunet.dataset_conversion.public import Output, Roles

    output = Output(dataset_id, name, overwrite, num_processes, progress=True)
    _tell(convert_medseg(root, output, Roles.parse(labelled, test, seed), classes_apart=classes_apart), dataset_id)


def mosmed(
    dataset_id: DatasetId,
    name: Name,
    root: Root,
    labelled: Labelled = None,
    test: Test = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    num_processes: NumProcesses = 2,
) -> None:
    """Make an nnU-Net dataset of MosMedData (COVID19_1110): 254 healthy and 856 diseased CTs, 50 with masks.

    FOLDER holds studies, with CT-0 to CT-4 in it, and masks.

    Raises:
        UserError: nnUNet_raw is not set, the id is taken, the layout is another one, or files cannot be used.
    """
    from gasnet_nnunet.dataset_conversion.mosmed import convert_mosmed
    from gasnet_nnunet.dataset_conversion.public import Output, Roles

    output = Output(dataset_id, name, overwrite, num_processes, progress=True)
    _tell(convert_mosmed(root, output, Roles.parse(labelled, test, seed)), dataset_id)


def merge(
    dataset_id: DatasetId,
    name: Name,
    datasets: Annotated[
        list[str],
        typer.Option("--dataset", "-d", metavar="DATASET ...", help="Ids or names of the datasets in nnUNet_raw."),
    ],
    as_volume_level: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DATASET ...",
            help="Those whose masks training must not see: their labelled cases become diseased.",
        ),
    ] = None,
    lesion_classes: Annotated[
        int | None,
        typer.Option(min=1, max=1, metavar="1", help="Make all lesion labels one, where the datasets' labels differ."),
    ] = None,
    overwrite: Overwrite = False,
    num_processes: NumProcesses = 2,
) -> None:
    """Make an nnU-Net dataset of several.

    Lung masks, masks kept aside and test cases are taken along. Cases of one name get their dataset's in front.

    Raises:
        UserError: nnUNet_raw is not set, the id is taken, the datasets do not fit together, or files cannot be used.
    """
    from gasnet_nnunet.dataset_conversion.merge import merge_datasets
    from gasnet_nnunet.dataset_conversion.public import Output
    from gasnet_nnunet.raw_dataset import find_dataset

    converted = merge_datasets(
        [find_dataset(dataset) for dataset in datasets],
        Output(dataset_id, name, overwrite, num_processes, progress=True),
        as_volume_level=[find_dataset(dataset) for dataset in as_volume_level or ()],
        one_lesion_class=lesion_classes is not None,
    )
    _tell(converted, dataset_id)


def dicom(
    dataset_id: DatasetId,
    name: Name,
    root: Annotated[Path, typer.Option("--in", metavar="ROOT", help="Folder of the studies, searched to its depths.")],
    manifest: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="Table (.csv, .xlsx); columns: path, PatientID, StudyInstanceUID or SeriesInstanceUID; diagnosis; and "
            "if wanted series, mask, structures.",
        ),
    ],
    kernel: Annotated[
        str, typer.Option(metavar="soft|lung", help="Kernel to prefer where a study has series of both kinds.")
    ] = "soft",
    seed: Annotated[
        int | None, typer.Option(help="Number the cases in an order drawn with this seed, not in that of the rows.")
    ] = None,
    link_table: Annotated[
        Path | None,
        typer.Option(metavar="FILE.csv", help="Also write who is who, outside of nnU-Net's folders. Keep it safe."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a dataset of this id and name, and an old link table.")
    ] = False,
    num_processes: NumProcesses = 2,
) -> None:
    """Make an nnU-Net dataset out of DICOM studies and a table of diagnoses, without patient data.

    The table says of each scan whether it is labelled, diseased, healthy or test. The chest series of its study is
    taken by a rule that the command prints. Cases and patients get pseudonyms.

    Raises:
        UserError: nnUNet_raw is not set, the id is taken, or the table or a series cannot be used.
    """
    from gasnet_nnunet.dataset_conversion.dicom import convert_dicom

    converted = convert_dicom(
        dataset_id=dataset_id,
        name=name,
        root=root,
        manifest=manifest,
        kernel=kernel,
        seed=seed,
        link_table=link_table,
        overwrite=overwrite,
        num_processes=num_processes,
        progress=True,
    )
    _tell(converted, dataset_id)
    if link_table:
        Console(highlight=False, soft_wrap=True).print(f"Who is who: {escape(str(link_table))}")


def _tell(converted: Converted, dataset_id: int) -> None:
    console = Console(highlight=False, soft_wrap=True)
    counts = ", ".join(f"{number} {kind}" for kind, number in converted.counts.items())
    console.print(f"Made {escape(str(converted.folder))}: {counts}.")
    for remark in converted.remarks:
        console.print(f"[yellow]Note:[/] {escape(remark)}")
    console.print(f"Report, with a picture of every case: {escape(str(converted.report))}")
    console.print(f"Next: [bold]gasnet-nnunet plan -d {dataset_id}[/]")
