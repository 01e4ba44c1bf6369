"""data.py build: a miniature of each of the 17 sources with its facts stated by hand, copies, split, balance, bad input; the
question files of others, --only and --thinking."""
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import data
import rewards

ROOT = Path(__file__).resolve().parent.parent

W, H = 64, 48
LU, RU, LL, RL, C = "Left Upper", "Right Upper", "Left Lower", "Right Lower", "Center Region"
BOX = {LU: (6, 6, 18, 14), RU: (46, 6, 58, 14), LL: (6, 34, 18, 42), RL: (46, 34, 58, 42), C: (27, 20, 37, 28)}  # px of W x H

# ---- writers of a file, with the truth it has to give: group, kind of lesion ("" healthy, None unknown), place -------------
def img(*truth, mode="RGB", times=1):
    def draw(file):  # noise that only two folders and the name decide
        rng = np.random.default_rng(zlib.crc32("/".join(file.parts[-3:]).encode()))
        a = rng.integers(0, 256, (H * times, W * times, 3), dtype=np.uint8)
        (Image.fromarray(a[..., 0].astype(np.uint16) * 200) if mode == "I;16" else Image.fromarray(a).convert(mode)).save(file)
    return draw, truth and (truth[0], [(truth[1], (*truth, None)[2])])

def mask(*places, mode="L", ink=255, paper=0):
    def draw(file):
        image = Image.new(mode, (W, H), paper)
        for place in places:
            ImageDraw.Draw(image).rectangle(BOX[place], fill=ink)
        image.save(file)
    return draw, ()

def says(*lines):
    return lambda file: file.write_text("\n".join(lines) + "\n"), ()

def scan(file, a, to_left=False):
    nibabel = pytest.importorskip("nibabel")
    nibabel.save(nibabel.Nifti1Image(a, np.diag([-1. if to_left else 1., 1, 1, 1])), file)

def vol(group, kind="", place=None, before=1, after=2, to_left=False):
    """A volume of 16 slices; shown are some without the lesion, the four with it, some without it again."""
    noise = np.random.default_rng(zlib.crc32(str(group).encode())).integers(-300, 300, (32, 24, 16), dtype=np.int16)
    sick, well = (kind, place), ("", None)
    return lambda file: scan(file, noise, to_left), (group, [well] * before + [sick] * 4 * bool(kind) + [well] * after)

def seg(*levels, organ=0, to_left=False):
    """Its mask: in slices 6 to 9, x from 22 on (the patient's right, seen on the left; with to_left x runs the other way), y
    from 16 on (in front, seen above)."""
    a = np.zeros((32, 24, 16), np.uint8)
    a[4:30, 4:22, 3:13] = organ
    for n, level in enumerate(levels):
        a[22 + 2 * n:28, 16:21, 6:10] = level
    return lambda file: scan(file, a, to_left), ()

def svg(*places):
    shapes = [[{"x": x, "y": y} for x, y in ((a, b), (c, b), (c, d), (a, d))] for a, b, c, d in map(BOX.get, places)]
    return f'<svg>{json.dumps([{"points": p, "annotation": {}, "regionType": "freehand"} for p in shapes])}</svg>'

def via(regions, shapes):
    """The annotator's JSON; regions: list, or a function that makes a dict of one."""
    told = {}
    for name, own in shapes.items():
        drawn = [{"shape_attributes": s, "region_attributes": {}} for s in own]
        told[f"{name}.jpg9"] = {"filename": f"{name}.jpg", "size": 9, "file_attributes": {},
                                "regions": regions(drawn)}
    return says(json.dumps(told))

def write(folder, files, under=""):
    for name, (draw, _) in files.items():
        file = folder / (under + name)
        file.parent.mkdir(parents=True, exist_ok=True)
        draw(file)
    return folder

# ---- the 17 sources: key, modality, organ, folder, files, how many pictures aren't asked and why -----------------------------
BONE, RED = dict(mode="RGBA", ink=(38, 38, 43, 255), paper=(0, 0, 0, 255)), dict(mode="RGB", ink=(254, 0, 0))
GASTRO = dict(mode="RGB", ink=(250, 250, 250), paper=(6, 6, 6))  # as JPEG: grey levels, around the edges more of them
VIA = dict(y0=[{"name": "polygon", "all_points_x": [6, 18, 18], "all_points_y": [6, 6, 14]}],
           y1=[{"name": "circle", "cx": 52, "cy": 10, "r": 5}],
           y2=[{"name": "ellipse", "cx": 32, "cy": 24, "rx": 2, "ry": 5, "theta": .2}],
           y3=[{"name": "circle", "cx": x, "cy": y, "r": 5} for x, y in ((10, 10), (52, 40))])
WHY = {"healthy": ("pathology", "location"), "label and mask disagree": ("anomaly", "pathology", "location"),
       "no mask or outline": ("location",), "in several regions": ("location",)}
A, A2, B = "A.%20Segmentation/1. Original Images/", "A.%20Segmentation/2. All Segmentation Groundtruths/", "B. Disease Grading/"
A_TRAIN, A_TEST, B_TRAIN, B_TEST = (f"{x}{y}ing Set/" for x in (A, f"{B}1. Original Images/") for y in ("a. Train", "b. Test"))
DR, GRADES = "diabetic retinopathy", "Image name,Retinopathy grade,Risk of macular edema ,,,,,"
CLL, NEVUS, COVID = "chronic lymphocytic leukemia", "melanocytic nevus", "COVID-19 pneumonia"
TREES = {
    "brats": ("brats2021", "MRI", "Brain", "RSNA_ASNR_MICCAI_BraTS2021_TrainingData/BraTS2021_",
        {**{f"00000/BraTS2021_00000_{x}.nii.gz": vol(0, "glioma", LU) if x == "flair" else (vol(x)[0], ()) for x in ("flair",
        "t1", "t1ce", "t2")}, "00000/BraTS2021_00000_seg.nii.gz": seg(1, 2, 4), "00002/BraTS2021_00002_flair.nii.gz":
        vol(2, "glioma", RU, to_left=True), "00002/BraTS2021_00002_seg.nii.gz": seg(4, 1, to_left=True)}, {"healthy": 6}),
    "brats as BMAD's README and code have it": ("brats2021", "MRI", "Brain", "Brain/", {  # masks through a colour map
        "train/good/img/00003_60.png": img(3, "", mode="L"), "train/good/00003_61.png": img(3, "", mode="L"),
        "valid/good/img/00003_70.png": img(3, "", mode="L"), "valid/Ungood/img/00005_60.png": img(5, "glioma", RL, mode="L"),
        "test/Ungood/img/00006_62.png": img(6, "glioma", C, mode="L"), "test/Ungood/00006_72.png": img(6, None, mode="L"),
        "test/Ungood/img/00007_99.png": img(7, "glioma"), "valid/Ungood/anomaly_mask/00005_60.png": mask(RL, **BONE),
        "test/Ungood/label/00006_62.png": mask(C, **BONE), "test/Ungood/label/00006_72.png": mask(**BONE)},
        {"healthy": 3, "no mask or outline": 1, "label and mask disagree": 1}),
    "lits": ("liverct", "CT", "Liver", "", {  # "Traing" is theirs; one has no tumor; a test volume has a training's number
        "Traing Batch 1/volume-0.nii": vol(0, "tumor", LU, 2, 2), "Traing Batch 1/segmentation-0.nii": seg(2, organ=1),
        "Batch 2/volume-28.nii": vol(28, before=4, after=0), "Batch 2/segmentation-28.nii": seg(organ=1),
        "A Test/test-volume-0.nii": (vol(9)[0], ())}, {"healthy": 8}),
    "liver as BMAD has it": ("liverct", "CT", "Liver", "hist_DIY/", {"train/good/1_40.png": img(1, "", mode="L"),
        "valid/img/good/2_41.png": img(2, "", mode="L"), "valid/img/Ungood/2_42.png": img(2, "tumor", LL),
        "test/img/Ungood/5_7.png": img(5, "tumor", RU), "test/img/good/5_8.png": img(5, ""), "valid/label/Ungood/2_42.png":
        mask(LL, ink=1), "test/label/Ungood/5_7.png": mask(RU, ink=1), "test/label/good/5_8.png": mask()}, {"healthy": 3}),
    "resc": ("resc", "OCT", "Retina", "RESC/", {  # the same name in two parts
        "Train/train/good/1_1.png": img(1, ""), "Val/val/good/2_1.png": img(2, ""), "Val/val/Ungood/2_7.png":
        img(2, "edema", LL), "Test/test/good/4_1.png": img(4, ""), "Test/test/Ungood/2_7.png": img(2, "edema"),
        "Val/val_label/Ungood/2_7.png": mask(LL), "Test/test_label/Ungood/2_7.png": mask(RU, C, ink=43)},
        {"healthy": 3, "in several regions": 1}),
    "busi": ("busi", "Ultrasound", "Breast", "Dataset_BUSI_with_GT/", {  # a palette PNG; two lesions; a blank mask
        "benign/benign (1).png": img(1, "benign tumor", LU, mode="P"), "benign/benign (1)_mask.png": mask(LU, mode="1", ink=1),
        "benign/benign (2).png": img(2, "benign tumor"), "benign/benign (2)_mask.png": mask(LU), "benign/benign (2)_mask_1.png":
        mask(RL), "malignant/malignant (1).png": img(3, "malignant tumor", RL, mode="RGBA"), "malignant/malignant (1)_mask.png":
        mask(RL), "normal/normal (1).png": img(4, ""), "normal/normal (1)_mask.png": mask()},
        {"healthy": 1, "in several regions": 1}),
    "isic": ("isic2018", "Dermoscopy", "Skin", "ISIC2018_", {  # one image is of both tasks; two are of one lesion
        "Task1-2_Training_Input/ISIC_0000005.jpg": img(1, "basal cell carcinoma", RL, times=2),
        "Task3_Training_Input/ISIC_0000005.jpg": img(), "Task3_Training_Input/ISIC_0000006.jpg": img(2, NEVUS),
        "Task3_Training_Input/ISIC_0000007.jpg": img(2, NEVUS), "Task3_Training_Input/ISIC_0000008.jpg": img(3, "melanoma"),
        "Task1_Training_GroundTruth/ISIC_0000005_segmentation.png": mask(RL), "Task3_Training_GroundTruth.csv":
        says("image,MEL,NV,BCC,AKIEC,BKL,DF,VASC", *(f"ISIC_000000{x},0.0,0.0,0.0,0.0" for x in ("5,0.0,0.0,1.0",
        "6,0.0,1.0,0.0", "7,0.0,1.0,0.0", "8,1.0,0.0,0.0"))), "Task3_Training_LesionGroupings.csv":
        says("image,lesion_id,diagnosis_confirm_type", *(f"ISIC_000000{x},single" for x in ("5,HAM_1", "6,HAM_2", "7,HAM_2",
        "8,HAM_3")))}, {"no mask or outline": 3}),
    "mosmed": ("mosmed", "CT", "Lung", "", {"studies/CT-0/study_0001.nii.gz": vol(1, before=4, after=0),
        "studies/CT-1/study_0255.nii.gz": vol(2, COVID, LU), "masks/study_0255_mask.nii.gz": seg(1)}, {"healthy": 7}),
    "atlas": ("atlas", "CE-MRI", "Liver", "", {"imagesTr/im01.nii.gz": vol(1, "tumor", LU, 2, 2), "labelsTr/im01.nii.gz":
        seg(2, organ=1), "imagesTs/im61.nii.gz": (vol(3)[0], ()), "imagesTr/im02_0000.nii.gz": vol(2, "tumor", LU, 2, 2),
        "labelsTr/im02.nii.gz": seg(2, organ=1)}, {"healthy": 8}),
    "ddti": ("ddti", "Ultrasound", "Thyroid", "", {  # two images of a case; TI-RADS told, empty, missing; an svg is broken
        "100_1.jpg": img(1, "nodule", LU, mode="L"), "100_2.jpg": img(1, "nodule", RL, mode="L"), "100.xml":
        says(f"<case><tirads>4a</tirads><mark><image>1</image>{svg(LU)}</mark>",
        f"<mark><image>2</image>{svg(RL, RL)}</mark></case>"), "101_1.jpg": img(2, "nodule"), "101.xml":
        says(f"<case><tirads/><mark><image>1</image>{svg(LL)[:-9]}</svg></mark></case>"), "102_1.jpg": img(3, "nodule"),
        "102.xml": says(f"<case><mark><image>1</image>{svg(RU, LL)}</mark></case>"), "103_1.jpg": img(4, "nodule"),
        "103.xml": says(f"<case><mark><image>1</image>{svg(LL)}</mark></case>".replace('"y": ', '"y": null, "z": '))},
        {"no mask or outline": 2, "in several regions": 1}),
    "ddti as PNG": ("ddti", "Ultrasound", "Thyroid", "DDTI/", {  # no patients told: a hundred images are a group
        "1_or_data/image/0000.PNG": img(1, "nodule", LU),
        "1_or_data/mask/0000.PNG": mask(LU), "1_or_data/image/0001.PNG": img(1, "nodule", RL, mode="L"),
        "1_or_data/mask/0001.PNG": mask(RL), "1_or_data/image/0100.PNG": img(2, "nodule", C),
        "1_or_data/mask/0100.PNG": mask(C), "2_preprocessed_data/stage1/p_image/0000.PNG": img(), "1_or_data/category.csv":
        says("ID,CATE", "0000.PNG,1")}, {}),
    "kvasir": ("kvasirseg", "Endoscopy", "Alimentary", "Kvasir-SEG/", {"images/cju1.jpg": img(1, "polyp", RU, times=2),
        "masks/cju1.jpg": mask(RU, **GASTRO), "kavsir_bboxes.json": says("{}"), "images/cju2.jpg":
        img(2, "polyp", C, mode="CMYK"), "masks/cju2.jpg": mask(C, **GASTRO)}, {}),
    "cvc": ("cvcclinicdb", "Endoscopy", "Alimentary", "", {  # no table of sequences: a hundred frames are a group; 16 bits
        "Original/1.tif": img(1, "polyp", LL), "Original/99.tif": img(1, "polyp", LL, mode="I;16"), "Original/100.tif":
        img(2, "polyp", LL), "Original/612.tif": img(3, "polyp", LL), **{f"Ground Truth/{n}.tif": mask(LL) for n in (1, 99, 100,
        612)}}, {}),
    "cvc as PNG": ("cvcclinicdb", "Endoscopy", "Alimentary", "CVC/", {  # both forms in one folder, and the sequences
        **{f"{x}/Ground Truth/{n}.{x.lower()}": mask(RU) for x in ("PNG", "TIF") for n in (1, 2, 3)},
        **{f"TIF/Original/{n}.tif": img() for n in (1, 2, 3)}, "PNG/Original/1.png": img(1, "polyp", RU), "PNG/Original/2.png":
        img(1, "polyp", RU), "PNG/Original/3.png": img(2, "polyp", RU), "metadata.csv": says("frame_id,sequence_id", "1,1",
        "2,1", "3,2")}, {}),
    "ph2": ("ph2", "Dermoscopy", "Skin", "PH2Dataset/", {  # lesions in 1-bit BMP; the colour classes of roi are none
        f"PH2 Dataset images/IMD00{n}/IMD00{n}_{x}": what for n, kind, place in ((0, "common nevus", LU), (1, "atypical nevus",
        RU), (2, "melanoma", C)) for x, what in {f"Dermoscopic_Image/IMD00{n}.bmp": img(n, kind, place),
        f"lesion/IMD00{n}_lesion.bmp": mask(place, mode="1", ink=1), f"roi/IMD00{n}_R1_Label4.bmp":
        mask(RL, mode="1", ink=1)}.items()} | {"PH2_dataset.txt":
        says("|| Name || Histological Diagnosis || Clinical Diagnosis ||", *(f"|| IMD00{n} || || {n} ||" for n in range(3)),
        "Legend:")}, {}),
    "idrid": ("idrid", "Fundus", "Retina", "", {  # the optic disc is no lesion; A and B, Training and Testing number apart
        f"{A_TRAIN}IDRiD_01.jpg": img(1, DR, LU, times=2), f"{A_TRAIN}IDRiD_02.jpg": img(2, DR), f"{A_TEST}IDRiD_55.jpg":
        img(3, DR, RL), f"{A2}a. Training Set/5. Optic Disc/IDRiD_01_OD.tif": mask(RU, **RED),
        f"{A2}a. Training Set/1. Microaneurysms/IDRiD_01_MA.tif": mask(LU, **RED),
        f"{A2}a. Training Set/3. Hard Exudates/IDRiD_01_EX.tif": mask(LU, **RED),
        f"{A2}a. Training Set/2. Haemorrhages/IDRiD_02_HE.jpg": mask(LU, **RED),
        f"{A2}a. Training Set/4. Soft Exudates/IDRiD_02_SE.jpg": mask(RL, **RED),
        f"{A2}b. Testing Set/3. Hard Exudates/IDRiD_55_EX.jpg": mask(RL, **RED), f"{B_TRAIN}IDRiD_001.jpg": img(4, ""),
        f"{B_TRAIN}IDRiD_002.jpg": img(5, DR), f"{B_TEST}IDRiD_001.jpg": img(6, DR),
        f"{B}2. Groundtruths/a. IDRiD_Disease Grading_Training Labels.csv": says(GRADES, "IDRiD_001,0,0,,,,,",
        "IDRiD_002,3,2,,,,,"), f"{B}2. Groundtruths/b. IDRiD_Disease Grading_Testing Labels.csv": says(GRADES,
        "IDRiD_001,4,0,,,,,")}, {"healthy": 1, "in several regions": 1, "no mask or outline": 2}),
    "pedidemi": ("pedidemi", "MRI", "Brain", "", {f"P{n}/P{n}_{x}.nii.gz": what for n in (1, 2) for x, what in {  # a guess
        "FLAIR": vol(n, "demyelination", LU), "T1": (vol(n)[0], ()), "FLAIR_mask": seg(1)}.items()}, {"healthy": 6}),
    "br35h": ("br35h", "MRI", "Brain", "", {  # RGB and grey; No beside no; outlines of some, twice, with copies of the images
        "yes/y0.jpg": img(0, "tumor", LU), "yes/y1.jpg": img(1, "tumor", RU, mode="L"), "yes/y2.jpg": img(2, "tumor", C),
        "yes/y3.jpg": img(3, "tumor"), "yes/y4.jpg": img(4, "tumor"), "no/no1.jpg": img(5, ""), "no/No1.jpg": img(6, ""),
        "pred/pred0.jpg": img(), "Br35H-Mask-RCNN/TRAIN/y0.jpg": img(),
        "Br35H-Mask-RCNN/TRAIN/annotations_train.json": via(list, VIA),
        "Br35H-Mask-RCNN/annotations_all.json": via(lambda x: dict(enumerate(x)), VIA)},
        {"healthy": 2, "in several regions": 1, "no mask or outline": 1}),
    "chest": ("chestxray14", "X-ray", "Chest", "", {  # RGBA; boxes in px of 1024 x 1024, "Infiltrate" for "Infiltration"
        "images_001/images/00000001_000.png": img(1, "infiltration", LL, mode="RGBA"), "images_001/images/00000001_001.png":
        img(1, "", mode="L"), "images/00000002_000.png": img(2, "pleural thickening", mode="L"), "images/00000003_000.png":
        img(3, "mass", RU, mode="L"), "Data_Entry_2017.csv":
        says("Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age", "00000001_000.png,Infiltration,0,1,58",
        "00000001_001.png,No Finding,1,1,58", "00000002_000.png,Pleural_Thickening,0,2,9", "00000003_000.png,Mass,0,3,77"),
        "BBox_List_2017.csv": says("Image Index,Finding Label,Bbox [x,y,w,h],,,",
        "00000001_000.png,Infiltrate,100.5,600,250,300,,,", "00000003_000.png,Mass,700,100.25,150,150.75,,,")},
        {"healthy": 1, "no mask or outline": 1}),
    "lymphoma": ("malignantlymphoma", "Microscopy", "Lymph Node", "", {"CLL/sj-03-476_001.tif": img(1, CLL),
        "CLL/sj-03-476_002.tif": img(1, CLL), "FL/sj-05-894-R3_001.tif": img(2, "follicular lymphoma", times=2),
        "MCL/sj-04-3077-R1_001.tif": img(3, "mantle cell lymphoma")}, {"no mask or outline": 4}),
    "bach": ("bach", "Microscopy", "Breast", "Photos/", {"Normal/n001.tif": img(1, ""), "Benign/b001.tif":
        img(2, "benign lesion", mode="I;16"), "InSitu/is001.tif": img(3, "in situ carcinoma", times=2), "Invasive/iv001.tif":
        img(4, "invasive carcinoma"), "../WSI/A01.svs": says("slide")}, {"healthy": 1, "no mask or outline": 3})}

def facts_of(folder, key, out):
    (out / "images" / key).mkdir(parents=True, exist_ok=True)
    return {job["file"]: data.examine(job, out, W) for job in data.find(key, folder)}

def left_out(out, key):
    return {why: int(n) for why, n in re.findall(rf"^- {key}, (.*): (\d+)$", (out / "dataset.md").read_text(), re.M)}

@pytest.mark.parametrize("name", TREES)
def test_source(name, tmp_path):
    """What is drawn and written by hand is found: modality, organ, group, lesions, place; pictures of at most 64 px that any
    viewer opens; each question's answer is the truth; each question not asked is counted under its reason."""
    key, modality, anatomy, under, files, left = TREES[name]
    folder = write(tmp_path / "in", files, under)
    truth, told = {under + x: t for x, (_, t) in files.items() if t}, facts_of(folder, key, tmp_path / "f")
    assert sorted(told) == sorted(truth)
    for file, (_, pictures) in truth.items():
        assert [(f["finding"], f["place"][0]) for f in told[file]] == pictures, file
        for f in told[file]:
            assert (f["source"], f["modality"], f["anatomy"]) == (key, modality, anatomy)
            with Image.open(tmp_path / "f" / f["image"]) as image:
                assert image.mode in ("L", "RGB") and image.size == ((32, 24) if ".nii" in file else (W, H)), file
    pairs = {(truth[file][0], f["group"]) for file, facts in told.items() for f in facts}
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}), "groups are as stated"

    out = tmp_path / "out"
    records = data.read_records(data.build({key: folder}, out, W, workers=1))
    pictures, asked, missing = {f["image"]: f for facts in told.values() for f in facts}, Counter(), left_out(out, key)
    for r in records:
        f, right = pictures[r["image"]], r["options"]["ABCD".index(r["answer"])]
        assert len(r["options"]) == 4 and os.path.isfile(r["path"]) and r["source"] == key and r["thought"] is None
        assert right == {"modality": modality, "anatomy": anatomy, "location": f["place"][0], "pathology": f["finding"],
                         "anomaly": "Abnormal" if f["finding"] else "Normal"}[r["task"]]
        pairs = itertools.combinations(r["options"], 2)
        assert r["task"] in data.DEALT or not [pair for pair in pairs if {*pair} in data.ALIKE]  # two alike are both wrong
        assert not [o for o in r["options"] if {o, right} in data.ALIKE]
        asked[r["task"]] += 1
    assert {k: n for k, n in missing.items() if "no picture with another answer" not in k} == {
        f"{task}: {why}": n for why, n in left.items() for task in WHY[why]}
    for task in data.TASKS:
        assert asked[task] + sum(n for k, n in missing.items() if k.startswith(task)) == len(pictures), task
    assert asked["anatomy"] == asked["modality"] == len(pictures) and (out / f"{key}.png").is_file()

def test_patterns():
    """Patterns are of the end of a path, from a folder's or file's beginning on; * stays in one name, ** doesn't."""
    files = ["a/yes/im 1_2.PNG", "no/3.png", "a/yes/b/4.png", "a/eyes/5.png", "yes/6xpng", "yes/7.png.gz", "in/b/c/im_89.nii.gz"]
    found = {file: (name, named["kind"]) for file, name, named in data.matches("{kind=yes|no}/{id}.png", files)}
    assert found == {"a/yes/im 1_2.PNG": ("im 1_2", "yes"), "no/3.png": ("3", "no")}
    assert [name for _, name, _ in data.matches("{at=IN|out}/**/im_{id=##}.nii*", files)] == ["in89"]
    assert not [*data.matches("im_{id=#}.nii*", files)] and not [*data.matches("(?!)", files)]

def test_17_of_17():
    """No source without a miniature."""
    assert {x[0] for x in TREES.values()} == {s.key for s in data.SOURCES} and len({x[0] for x in TREES.values()}) == 17

def test_what_a_source_half_tells(tmp_path):
    """A box for one finding of two: neither kind nor place can be asked. A mask without a diagnosis (ISIC's task 1): the place
    can. A sick volume without a mask: not lost in silence, nor healthy. Folders not as stated: two patients stay two."""
    write(tmp_path, {
        "c/BBox_List_2017.csv": says("Image Index,Finding Label,Bbox [x,y,w,h]", "00000001_000.png,Mass,9,9,99,99"),
        "c/Data_Entry_2017.csv": says("Image Index,Finding Labels", "00000001_000.png,Mass|Hernia"),
        "c/images/00000001_000.png": img(), "i/X_Input/ISIC_0000000.jpg": img(), "i/ISIC_0000000_segmentation.png": mask(RU)})
    ((f,),) = facts_of(tmp_path / "c", "chestxray14", tmp_path).values()
    assert [data.true_answer(f, task)[0] for task in ("anomaly", "pathology", "location")] == ["Abnormal", None, None]
    ((f,),) = facts_of(tmp_path / "i", "isic2018", tmp_path).values()
    assert data.true_answer(f, "pathology")[0] is None and data.true_answer(f, "location")[0] == RU
    write(tmp_path, {"m/CT-1/study_0300.nii.gz": vol(1), **{f"p/P{n}/anat/P{n}_FLAIR.nii.gz": vol(1) for n in (1, 2)}})
    (facts,) = facts_of(tmp_path / "m", "mosmed", tmp_path).values()
    assert facts and all("why" in f or f["finding"] is None for f in facts)
    assert len({job["group"] for job in data.find("pedidemi", tmp_path / "p")}) == 2

def test_window(tmp_path):
    """The liver's CT is shown from -200 (black) to 250 HU (white), what lies beyond is cut off."""
    a = np.zeros((32, 24, 16), np.int16)
    a[:16, :12], a[16:, :12], a[:16, 12:], a[16:, 12:] = -1000, -200, 250, 25
    scan(tmp_path / "volume-1.nii", a)
    write(tmp_path, {"segmentation-1.nii": seg(organ=1)})
    with Image.open(tmp_path / facts_of(tmp_path, "liverct", tmp_path)["volume-1.nii"][0]["image"]) as image:
        assert [image.getpixel(p) for p in ((24, 18), (8, 18), (24, 6), (8, 6))] == [0, 0, 255, 127]

# ---- location ---------------------------------------------------------------------------------------------------------------
ONE, TWO, THREE, FOUR = (.1, .1, .3, .3), (.7, .1, .9, .3), (.1, .7, .3, .9), (.7, .7, .9, .9)
SEVERAL, HALF = "in several regions", "over half of the picture"

@pytest.mark.parametrize("place, boxes", [
    (LU, [ONE]), (RU, [TWO]), (LL, [THREE]), (RL, [FOUR]), (C, [(.4, .4, .6, .6)]), (C, [(.36, .36, .46, .46)]),
    (LU, [(.4, .05, .49, .3)]), (RL, [(.51, .75, .6, 1)]),                # the middle of one axis isn't the centre
    (LU, [(0, 0, .05, .05)]), (RL, [(.95, .95, 1, 1)]),                   # in the corners
    (LU, [(.25, .25, .36, .36)]), (LU, [(.2, .1, .55, .3)]), (RU, [(.45, .1, .8, .3)]),  # over a border: the centroid's
    (LU, [(.05, .3, .6, .65), (.05, .1, .3, .3)]), (C, [(.2, .2, .75, .8)]),             # large, over several regions
    (LL, [(0, 0, .2, 1)]), (RU, [(0, 0, 1, .2)]),                         # right on a border: the right, the lower one
    (LU, [(.05, .05, .2, .2), (.25, .25, .32, .32)]),                     # two parts in one region
    (LU, [ONE, (.8, .8, .9, .9)]), (RL, [(.1, .1, .2, .2), FOUR]),      # a part of less than half the size elsewhere
    (LU, [(.1, .1, .4, .15), (.1, .1, .15, .4), (.35, .1, .4, .4), (.1, .35, .4, .4)]),     # a ring around its centroid
    (SEVERAL, [ONE, FOUR]), (SEVERAL, [ONE, TWO]), (SEVERAL, [ONE, THREE]),              # two parts of one size, or so
    (SEVERAL, [ONE, (.7, .1, .9, .33)]), (SEVERAL, [(.1, .1, .26, .26), FOUR]), (SEVERAL, [ONE, TWO, THREE, FOUR]),
    (HALF, [(0, 0, 1, 1)]), (HALF, [(.1, .1, .9, .9)]), (HALF, [(0, 0, .52, 1)])], ids=str)
def test_location(place, boxes):
    """Drawn lesions, on oblong images too, lie in the region of the centroid of their largest part; several of similar size in
    different regions, or a lesion over half of the picture, in none, and it is said why."""
    for w, h in ((64, 48), (90, 90), (300, 60), (40, 120), (640, 480)):
        drawn = np.zeros((h, w), bool)
        for x, y, x2, y2 in boxes:
            drawn[round(y * h):round(y2 * h), round(x * w):round(x2 * w)] = True
        region, why, (x, y) = data.location_of(drawn)
        assert (region or why) == place and (region is None) == (why is not None) and 0 < x < 1 and 0 < y < 1, (w, h)

def test_parts():
    """Parts are counted once, whatever their form: a diagonal line a pixel wide, a comb, a frame around a dot, dots; areas and
    centroids are those of their pixels, also where a picture is large."""
    line, comb, frame, dots = np.eye(90, dtype=bool), np.zeros((90, 60), bool), np.zeros((600, 800), bool), np.zeros((64, 64), bool)
    comb[:, ::10], comb[45] = True, True
    frame[100:500, 100:700], frame[150:450, 150:650], frame[290:310, 390:410] = True, False, True
    dots[5::20, 5::20] = True
    for drawn, areas in ((line, [90]), (line[::-1], [90]), (comb, [comb.sum()]), (frame, [90_000, 400]), (dots, [1] * 9)):
        area, x, y = data.parts_of(drawn)
        assert sorted(area) == sorted(areas)
        assert np.allclose([(area * x).sum(), (area * y).sum()], [(z + .5).sum() for z in drawn.nonzero()[::-1]])

# ---- pictures that look the same --------------------------------------------------------------------------------------------
def drawn(n, pair=("MRI", "Brain"), lesion=None):
    return Image.fromarray(data.draw_phantom(np.random.default_rng(n), *pair, lesion)[0])

def test_copies_in_another_form_are_one_group(tmp_path):
    """As in Br35H: pictures saved again as JPEG of two qualities, mirrored, 3 % smaller, under other names and labels, are one
    group each; other pictures of the same kind stay apart; none stands in train and test; dataset.md counts them."""
    for x in ("yes", "no"):
        (tmp_path / "in" / x).mkdir(parents=True)
    for n in range(12):
        one = drawn(n)
        small = one.resize((109, 109), Image.Resampling.LANCZOS)
        for k, (image, quality) in enumerate(((one, 95), (one, 50), (small, 80), (one.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 70))):
            image.save(tmp_path / "in" / ("yes", "no")[(n + k) % 2] / f"{'abcd'[k]}{n:02}.jpg", quality=quality)
        drawn(100 + n).save(tmp_path / "in" / "yes" / f"e{n:02}.jpg")
    records = data.read_records(data.build({"br35h": tmp_path / "in"}, tmp_path / "out", workers=1))
    groups, splits = defaultdict(set), defaultdict(set)
    for r in records:
        kind, n = re.search(r"-([a-e])(\d\d)\.png", r["image"]).groups()
        groups[kind == "e", n].add(r["group"])
        splits[kind == "e", n].add(r["split"])
    assert len(groups) == 24 and all(len(x) == 1 for x in (*groups.values(), *splits.values()))
    assert len({r["group"] for r in records}) == 24
    assert "| br35h | 60 | 24 | 48 |" in (tmp_path / "out" / "dataset.md").read_text()

def test_alike_across_sources(tmp_path):
    """A picture that is in two sources stands on one side in both, also under another form."""
    for n in range(30):
        for name in (f"bach/Benign/b{n:03}.tif", f"br/yes/y{n}.jpg"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            drawn(n, ("Microscopy", "Breast")).save(tmp_path / name)
    records = data.read_records(data.build({"bach": tmp_path / "bach", "br35h": tmp_path / "br"}, tmp_path / "out", workers=1))
    sides = defaultdict(set)
    for r in records:
        sides[int(re.search(r"[by](\d+)\.png", r["image"])[1])].add((r["source"], r["split"]))
    assert {len(x) for x in sides.values()} == {2} and all(len({split for _, split in x}) == 1 for x in sides.values())
    assert {split for x in sides.values() for _, split in x} == {"train", "test"}

def test_different_pictures_stay_apart():
    """Of 208 phantoms, 16 of each modality and region, healthy and not, none looks the same as another (threshold: correlation
    .99, difference 4 of 255; the closest two of 2,000 had .986)."""
    looks = [data.look_of(drawn(n, pair, ("solid", LU) if n % 2 else None)) for pair in data.PAIRS for n in range(16)]
    assert len(set(data.join_alike(np.array(looks), np.arange(208)).tolist())) == 208

def test_pictures_of_one_kind_are_told_apart_without_comparing_all(monkeypatch):
    """Of 300 phantoms of one kind, whose pairs often correlate, few pairs are compared at full size: time must not grow with
    the square of a source's pictures."""
    looks = np.array([data.look_of(drawn(n, ("X-ray", "Chest"))) for n in range(300)])
    real, compared = data.same, []
    monkeypatch.setattr(data, "same", lambda x, y: compared.append(len(x)) or real(x, y))
    assert len(set(data.join_alike(looks, np.arange(300)).tolist())) == 300
    assert sum(compared) < 300

def test_none_is_missed():
    """All pairs compared one by one at full size give the same groups, for pictures on both sides of the threshold; groups
    told before stay joined; the smallest number names them."""
    rng, looks = np.random.default_rng(0), []
    for n in range(20):
        one = np.float32(drawn(n, data.PAIRS[n % 3]).convert("L").resize((64, 64)))
        for strength in (0, 1, 2, 3, 4, 6):
            a = one[:, ::rng.choice((-1, 1))] + strength * rng.standard_normal((64, 64)) + rng.uniform(-3, 3)
            looks.append(np.uint8(np.clip(a, 0, 255)))
    looks, told = np.array(looks), np.arange(120)
    told[7] = 100
    want, (i, j) = told.copy(), np.triu_indices(120, 1)
    for k in range(0, len(i), 1000):
        p, q = i[k:k + 1000], j[k:k + 1000]
        for x, y in np.c_[p, q][data.same(looks[p], looks[q])]:
            want[want == max(want[x], want[y])] = min(want[x], want[y])
    got = data.join_alike(looks, told)
    assert (got == want).all() and 20 < len(set(got.tolist())) < 100 and got[7] == got[100]

def test_nothing_to_see(tmp_path):
    """Blank pictures and nearly blank ones are left out and counted; they join no others."""
    write(tmp_path / "in", BUSI)
    for n, a in enumerate((np.zeros((50, 50)), np.full((50, 50), 255), 90 + np.random.default_rng(0).normal(0, 2, (50, 50)))):
        Image.fromarray(np.uint8(a)).save(tmp_path / f"in/benign/benign ({90 + n}).png")
    out = Path(data.build({"busi": tmp_path / "in"}, tmp_path / "out", workers=1)).parent
    assert left_out(out, "busi")["shows nothing"] == 3
    assert len({r["group"] for r in data.read_records(out / "medad38k.jsonl")}) == 6

# ---- split ------------------------------------------------------------------------------------------------------------------
def split_of(facts, seed=0):
    data.split_by_group(facts := [dict(f) for f in facts], seed)
    return facts

def test_split():
    """70 % of each source, to a group; no group on both sides; the seed decides."""
    sizes = (("x", 200, 50), ("y", 90, 90), ("z", 300, 10))  # source, pictures, groups
    facts = [{"source": s, "group": f"{s} {i % k}"} for s, n, k in sizes for i in range(n)]
    done = split_of(facts)
    for source, n, group in (("x", 140, 4), ("y", 63, 1), ("z", 210, 30)):
        assert abs(sum(f["split"] == "train" for f in done if f["source"] == source) - n) < group
    assert len({(f["group"], f["split"]) for f in done}) == len({f["group"] for f in done}) == 150
    assert split_of(facts) == done and split_of(facts, 1) != done and {f["split"] for f in done} == {"train", "test"}

def test_split_is_linear():
    """12,000 groups of a picture each are split in well under a minute."""
    facts, start = [{"source": "x", "group": f"x {i}"} for i in range(12_000)], time.perf_counter()
    data.split_by_group(facts, 0)
    assert time.perf_counter() - start < 2

# ---- builds -----------------------------------------------------------------------------------------------------------------
def tree_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

KILLED = """
import os, signal, sys, data
real = data.examine
def examine(job, **where):
    if "/busi/" in job["path"] and job["n"] == 9:
        os.killpg(0, signal.SIGKILL)
    return real(job, **where)
data.examine = examine
data.build({"busi": sys.argv[1], "bach": sys.argv[2]}, sys.argv[3], 64, workers=int(sys.argv[4]))
"""

@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two sources (one picture of each is there twice), and a build of them without a break."""
    d = tmp_path_factory.mktemp("two")
    for n in range(1, 24):
        kind = ("benign", "malignant", "normal")[n % 3]
        write(d / "bach/Photos", {f"{('Normal', 'Benign')[n % 2]}/b{n:03}.tif": img()})
        write(d / "busi" / kind, {f"{kind} ({n}).png": img(times=1 + n % 2),
                                  f"{kind} ({n})_mask.png": mask(*[list(BOX)[n % 5]] * (kind != "normal"))})
    shutil.copy(d / "busi/benign/benign (3).png", d / "busi/benign/benign (99).png")
    shutil.copy(d / "bach/Photos/Benign/b001.tif", d / "bach/Photos/Normal/n099.tif")
    data.build({"busi": d / "busi", "bach": d / "bach"}, d / "whole", W, workers=1)
    return d

@pytest.mark.parametrize("workers", [1, 2])
def test_killed(two, tmp_path, workers):
    """A build that is killed half-way leaves no folder that looks finished; started again, with one process or two, it gives
    the same bytes as one without a break."""
    run = [sys.executable, "-c", KILLED, two / "busi", two / "bach", tmp_path / "out", str(workers)]
    p = subprocess.run(run, cwd=ROOT, capture_output=True, start_new_session=True, timeout=60)
    assert p.returncode == -9 and not (tmp_path / "out").exists()
    assert [x for x in os.listdir(tmp_path) if x == "out.writing"], "it was under way"
    data.build({"bach": two / "bach", "busi": two / "busi"}, tmp_path / "out", W, workers=workers)
    assert tree_of(tmp_path / "out") == tree_of(two / "whole") and os.listdir(tmp_path) == ["out"]

def test_failed_build_leaves_nothing(two, tmp_path, monkeypatch):
    """A build stopped half-way (here by Ctrl-C) leaves neither the folder nor what was written beside it."""
    def stop(*a):
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "medad_records", stop)
    with pytest.raises(KeyboardInterrupt):
        data.build({"busi": two / "busi"}, tmp_path / "out", W, workers=1)
    assert os.listdir(tmp_path) == []

def test_what_is_built(two):
    """46 pictures of two sources: images, questions, a sheet a source, dataset.md that counts them; nothing else. Of what is
    there twice the later copy, under another label or not, is left out and counted: neither asked nor on disk."""
    records, about = data.read_records(two / "whole" / "medad38k.jsonl"), (two / "whole" / "dataset.md").read_text()
    assert sorted(os.listdir(two / "whole")) == ["bach.png", "busi.png", "dataset.md", "images", "medad38k.jsonl"]
    assert len(list((two / "whole" / "images").rglob("*.*"))) == 46 == len({r["image"] for r in records})
    for key in ("source", "modality", "anatomy", "task", "answer", "split"):
        for name, n in Counter(r[key] for r in records).items():
            assert re.search(rf"{name} \| 23 \| 23 \| 1 \| \d+ \| \d+ \| {n} \|" if key == "source" else f" {name} {n}[,.]", about)
    assert len({r["id"] for r in records}) == len(records)
    for key, twins in (("busi", r"benign-(3|99)-?\."), ("bach", r"(b001|n099)\.")):
        assert len({r["image"] for r in records if re.search(twins, r["image"])}) == 1
        assert left_out(two / "whole", key)["the same picture as another"] == 1

@pytest.fixture(scope="module")
def unbalanced(tmp_path_factory):
    """600 pictures: three of four tumours are benign, most findings infiltrations, most lesions in one place."""
    d, rng, facts = tmp_path_factory.mktemp("u"), np.random.default_rng(0), []
    table, boxes = ["Image Index,Finding Labels"], ["Image Index,Finding Label,Bbox [x,y,w,h]"]
    findings = {"No Finding": .3, "Infiltration": .4, "Effusion": .1, "Mass": .1, "Nodule": .05, "Cardiomegaly": .05}
    for n in range(600):
        place = str(rng.choice(list(BOX), p=(.64, .12, .1, .08, .06)))
        if n < 240:
            kind = str(rng.choice(["benign", "malignant", "normal"], p=(.6, .2, .2)))
            places = [place] * (kind != "normal")
            write(d / "busi" / kind, {f"{kind} ({n}).png": img(), f"{kind} ({n})_mask.png": mask(*places)})
        else:
            kind, name = str(rng.choice(list(findings), p=[*findings.values()])), f"{n // 2:08}_{n % 2:03}.png"
            x, y, x2, y2 = BOX[place]
            write(d, {f"chest/images/{name}": img(mode="L")})
            table.append(f"{name},{kind}")
            boxes += [f"{name},{kind},{16 * x},{21 * y},{16 * (x2 - x)},{21 * (y2 - y)}"] * (kind != "No Finding")
    write(d / "chest", {"Data_Entry_2017.csv": says(*table), "BBox_List_2017.csv": says(*boxes)})
    with pytest.MonkeyPatch.context() as patch:
        real = data.split_by_group
        patch.setattr(data, "split_by_group", lambda f, seed: (facts.extend(map(dict, f)), real(f, seed)))
        return data.read_records(data.build({"busi": d / "busi", "chestxray14": d / "chest"}, d / "out")), facts

def assert_blind_is_lost(records, least):
    """Naive Bayes on the question's words and the options' texts and letters, fitted on train, is within 5 points of chance on
    test; chance is one of those of its options that are ever right for this organ (two of four for a state)."""
    seen, alive, out = defaultdict(lambda: [1, 1]), defaultdict(set), defaultdict(lambda: np.zeros(3))

    def clues(r, k):
        task, o = r["task"], r["options"][k]
        return [(task, o), (task, o, k), *((task, o, x) for x in (*r["question"].split(), *r["options"]))]
    for r in (records := [r for r in records if r["task"] in ("anomaly", "pathology", "location")]):
        right = "ABCD".index(r["answer"])
        alive[r["task"], r["task"] == "location" or r["anatomy"]].add(r["options"][right])
        for k in range(4) if r["split"] == "train" else ():
            for clue in clues(r, k):
                seen[clue][k == right] += 1
    weight = defaultdict(float, {clue: np.log(yes / no) for clue, (no, yes) in seen.items()})
    for r in (r for r in records if r["split"] == "test"):
        guess = max(range(4), key=lambda k: sum(weight[c] for c in clues(r, k)))  # noqa: B023
        fit = alive[r["task"], r["task"] == "location" or r["anatomy"]] & set(r["options"])
        out[r["task"]] += ("ABCD"[guess] == r["answer"], 1 / len(fit), 1)
    assert len(out) == 3 and out["anomaly"][1] == out["anomaly"][2] / 2
    for task, (right, chance, n) in out.items():
        assert n >= least and abs(right - chance) < .05 * n, f"{task}: {right / n:.3f} of {n}, chance {chance / n:.3f}"

def assert_letters_even(records):
    for rows in (records, *([r for r in records if r["split"] == s] for s in ("train", "test"))):
        n = Counter(r["answer"] for r in rows)
        assert set(n) == set("ABCD") and all(abs(n[x] / len(rows) - .25) < .03 for x in n)

def test_built_questions_give_nothing_away(unbalanced):
    """Badly unbalanced sources: letters are even to 3 %, Normal is right as often as Abnormal, and who sees questions and
    options (of 12 seeds) but no image is at chance."""
    records, facts = unbalanced
    assert_letters_even(records)
    n = Counter((r["modality"], r["split"], r["options"]["ABCD".index(r["answer"])]) for r in records if r["task"] == "anomaly")
    assert len(n) == 8 and all(n[x, s, "Normal"] == n[x, s, "Abnormal"] > 5 for x, s, _ in n)
    assert_blind_is_lost([r for seed in range(12) for r in data.medad_records(split_of(facts, seed), seed)], 400)

def test_phantoms_give_nothing_away(tmp_path):
    """300 phantoms' letters are even; the questions of 2,600 more, not drawn, leave the blind at chance."""
    assert_letters_even(data.read_records(data.make_phantoms(tmp_path / "p", 5, 300)))
    rng, decks, records = np.random.default_rng(0), defaultdict(list), []
    for i in range(2600):
        modality, anatomy = data.PAIRS[i % len(data.PAIRS)]
        style, place = (str(rng.choice(x)) for x in (list(data.STYLES), data.LOCATIONS))
        kind = data.KINDS[anatomy][list(data.STYLES).index(style)] if rng.random() < data.LESION_RATE else None
        facts = dict(modality=modality, anatomy=anatomy, lesion=kind, style=style, location=place)
        records += data.phantom_records(facts, rng, f"g{i}", "a.png", decks, "train" if i % 10 < 7 else "test")
    assert_blind_is_lost(records, 400)

# ---- bad input --------------------------------------------------------------------------------------------------------------
BUSI = {f"{x}/{x} ({n}).png": img() for n in range(3) for x in ("benign", "normal")}

def test_bad_trees(tmp_path):
    """An unknown source, no folder, other files, output that is there: one sentence that names what was expected and found."""
    write(tmp_path, {"other/a.txt": says("x"), "full/b": says("x"), **{f"busi/{x}": what for x, what in BUSI.items()}})
    (tmp_path / "empty").mkdir()
    for sources, out, words in (
            ("cifar=busi", "out", ["cifar", "busi", "bach"]), ("busi=none", "out", ["busi", "none", "folder"]),
            ("busi=other", "out", ["busi", "expected", "benign", "found", "a.txt"]),
            ("busi=empty", "out", ["busi", "expected", "no file"]), ("busi=busi", "full", ["full", "already"]),
            ("ddti=other", "out", ["ddti", "1_or_data/image/{id=", "found"])):
        key, _, folder = sources.partition("=")
        with pytest.raises(data.DataError) as e:
            data.build({key: tmp_path / folder}, tmp_path / out)
        assert all(w in str(e.value) for w in words) and not re.search(r"\n|\(\?|\\", str(e.value))
    assert sorted(os.listdir(tmp_path)) == ["busi", "empty", "full", "other"]

@pytest.mark.parametrize("key, image, name, text", [
    ("ddti", "100_1.jpg", "100.xml", "<case><mark>"), ("br35h", "yes/y0.jpg", "annotations_all.json", "{"),
    ("br35h", "yes/y0.jpg", "annotations_all.json", '{"y0": {"filename": "y0.jpg"}}'),
    ("isic2018", "X_Input/ISIC_0000001.jpg", "Task3_X_GroundTruth.csv", "name,MEL\nISIC_0000001,1.0"),
    ("chestxray14", "images/00000001_000.png", "Data_Entry_2017.csv", "Image Index\n00000001_000.png"),
    ("chestxray14", "images/00000001_000.png", "BBox_List_2017.csv", "Image Index,Finding Label,x\n00000001_000.png,Mass,1"),
    ("idrid", "a. Training Set/IDRiD_001.jpg", "Grading_Training Labels.csv", "Image name,Retinopathy grade\nIDRiD_001,high")])
def test_bad_tables(tmp_path, key, image, name, text):
    """A table, XML or JSON that isn't as expected is told by name in one sentence, no traceback."""
    write(tmp_path, {image: img(), name: says(text)})
    with pytest.raises(data.DataError) as e:
        data.find(key, tmp_path)
    assert name in str(e.value) and "\n" not in str(e.value) and "Error" not in str(e.value)

def test_broken_images(tmp_path, capfd):
    """Among good ones a broken image or mask is counted; the first is named in a warning."""
    write(tmp_path, {f"busi/{x}": what for x, what in BUSI.items()})
    write(tmp_path, {"busi/benign/benign (9).png": img(), "busi/benign/benign (0)_mask.png": says("no image")})
    (tmp_path / "busi/benign/benign (9).png").write_bytes((tmp_path / "busi/benign/benign (1).png").read_bytes()[:900])
    out = Path(data.build({"busi": tmp_path / "busi"}, tmp_path / "out", workers=1)).parent
    assert {re.sub(r".*/\d+-|-?\.png", "", r["image"]) for r in data.read_records(out / "medad38k.jsonl")} == {
        "benign-1", "benign-2", "normal-0", "normal-1", "normal-2"}
    bad = left_out(out, "busi")
    assert bad["has a mask that is not an image, or has no pixels"] == 1
    assert bad["is truncated or broken"] == 1
    assert "warning: busi: 2 of 7 can't be used, as benign/benign (0).png: has a mask that is" in capfd.readouterr().err
    assert str(tmp_path) not in (out / "dataset.md").read_text()

@pytest.mark.parametrize("what, why", [("pointers", "not an image"), ("blank", "shows nothing"), ("volumes", "pip install nibabel")])
def test_a_source_without_pictures(tmp_path, what, why, monkeypatch):
    """Git-LFS pointers instead of images, blank images, volumes without nibabel: one sentence, nothing built, also beside a
    source that is well."""
    pointer = says("version https://git-lfs.github.com/spec/v1", "oid sha256:0", "size 9")
    bad = {"pointers": ("kvasirseg", {f"images/k{n}.jpg": pointer for n in range(9)}),
           "blank": ("kvasirseg", {f"images/k{n}.jpg": mask() for n in range(9)}),
           "volumes": ("mosmed", {"CT-0/study_0001.nii.gz": says("x")})}
    key, files = bad[what]
    write(tmp_path, {f"bad/{x}": file for x, file in files.items()} | {f"busi/{x}": file for x, file in BUSI.items()})
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(data.DataError, match=rf"^{key}: (\d+) of \1 can't be used, as .*{why}"):
        data.build({key: tmp_path / "bad", "busi": tmp_path / "busi"}, tmp_path / "out", workers=1)
    assert sorted(os.listdir(tmp_path)) == ["bad", "busi"]

def test_mask_of_another_shape(tmp_path):
    """A mask that is no plain scaling of its picture is refused, the picture counted; one of another size but the same shape,
    to a pixel, is taken."""
    write(tmp_path, {f"images/k{n}.jpg": img() for n in range(4)} | {f"masks/k{n}.jpg": mask(LU) for n in range(4)})
    for n, size in ((1, (W // 2, H // 2)), (2, (33, 24)), (3, (H, W))):
        with Image.open(tmp_path / f"masks/k{n}.jpg") as old:
            image = old.resize(size)
        image.save(tmp_path / f"masks/k{n}.jpg")
    told = facts_of(tmp_path, "kvasirseg", tmp_path)
    assert [told[f"images/k{n}.jpg"][0]["place"][0] for n in range(3)] == [LU] * 3
    assert [f["why"] for f in told["images/k3.jpg"]] == ["has a mask of another shape"]

def test_masks_of_16_bits_are_no_pictures(tmp_path):
    """All that isn't 0 is the lesion, however rare a label is or how large another one."""
    labels = np.zeros((100, 100), np.uint16)
    labels[10:60, 10:60], labels[:2, :50] = 1, 400
    Image.fromarray(labels).save(tmp_path / "mask.png")
    Image.fromarray(np.uint8(labels)).save(tmp_path / "a.png")
    job = dict(path=str(tmp_path / "a.png"), outlines=[], masks=[str(tmp_path / "mask.png")], canvas=None)
    (_, lesion, _), = data.photo(job)
    assert (lesion == (labels > 0)).all()

def test_tables_parted_by_tabs(tmp_path):
    """A table saved with tabs is read as one with commas."""
    write(tmp_path, {"in/images/00000001_000.png": img(), "in/Data_Entry_2017.csv": says("Image Index\tFinding Labels",
                                                                                        "00000001_000.png\tMass, or so")})
    (job,) = data.find("chestxray14", tmp_path / "in")
    assert job["finding"] == "mass, or so"


def test_missing_table(tmp_path, capfd):
    """Labels that stand in a table which isn't there: a warning names it, the questions are counted as not asked."""
    write(tmp_path, {f"in/images/0000000{n}_000.png": img() for n in range(3)})
    out = Path(data.build({"chestxray14": tmp_path / "in"}, tmp_path / "out", workers=1)).parent
    assert left_out(out, "chestxray14")["anomaly: no label"] == 3
    assert f"warning: chestxray14={tmp_path / 'in'}: no file Data_Entry_2017*.csv, which tells" in capfd.readouterr().err

def test_chance_is_told(tmp_path):
    """dataset.md says what chance is where fewer than four answers are ever right."""
    write(tmp_path / "in", {f"{x}/{x} ({n}).png": img() for n in range(40) for x in ("benign", "normal")} | {
        f"benign/benign ({n})_mask.png": mask((LU, RL)[n % 2]) for n in range(40)})
    about = (Path(data.build({"busi": tmp_path / "in"}, tmp_path / "out", workers=1)).parent / "dataset.md").read_text()
    assert "- anomaly of Ultrasound, Breast, test: 50 % (Abnormal, Normal)" in about
    assert f"- location, train: 50 % ({LU}, {RL})" in about and "- pathology" not in about

HOLD = """
import data, os, sys, time
with data.locked(sys.argv[1]):
    os.makedirs(os.path.dirname(sys.argv[1]) + "/out.writing/images")
    if os.fork():
        print("held", flush=True)
    time.sleep(20)  # the worker outlives its killed parent, and holds nothing
    os._exit(0)
"""

def test_one_run_at_a_time(two, tmp_path):
    """While a run holds an --out, another, build or not, is refused in one sentence; a killed run holds nothing any more; what
    it left goes with the next run."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "out"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(data.DataError, match="out: another run is at work there"):
        data.build({"busi": two / "busi"}, tmp_path / "out", W, workers=1)
    with data.locked(tmp_path / "other"):
        (tmp_path / "out.x.writing").mkdir()  # of another --out
    holder.kill()
    holder.wait()
    data.build({"busi": two / "busi"}, tmp_path / "out", W, workers=1)
    assert sorted(os.listdir(tmp_path)) == ["out", "out.x.writing"]

def test_command_line(tmp_path):
    """build says where the questions are; bad input: exit code 2, one line, nothing built."""
    def run(*args):
        args = [sys.executable, ROOT / "data.py", "build", *map(str, args)]
        return subprocess.run(args, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    good = write(tmp_path / "busi", BUSI)
    p = run(f"busi={good}", "--out", "o")
    assert p.returncode == 0 and p.stdout.strip().endswith("medad38k.jsonl") and len(data.read_records(p.stdout.strip())) >= 12
    for args in (("busi=none",), ("busi",), (f"BUSI={good}",), (f"busi={good}", "--out", "o"), (f"busi={good}", f"busi={tmp_path}")):
        p = run(*args)
        assert p.returncode == 2 and p.stderr.startswith("error: ") and p.stderr.count("\n") == 1, args
    for knob in ({"seed": -1}, {"max_side": 0}):
        with pytest.raises(data.DataError):
            data.build({"busi": good}, tmp_path / "out", **knob)
    assert sorted(os.listdir(tmp_path)) == ["busi", "o"]

# ---- others' questions ------------------------------------------------------------------------------------------------------
def omni(n, gt="Fundus imaging", **changes):
    return {"dataset": "ACRIMA", "question_id": f"ACRIMA_{n}", "question_type": "Modality Recognition", "question": "Which?",
            "gt_answer": gt, "image_path": f"Images/ACRIMA/{n // 2}.png", "option_A": "PET scan", "option_B": "X-ray scan",
            "option_C": "Blood test", "option_D": "Fundus imaging", "modality_type": "Fundus Photography", **changes}

def test_omnimedvqa(tmp_path, capsys):
    """The answer's text is matched with case, punctuation and spaces forgiven, an exact match first; C and D may be absent,
    modality_type be modality; what fits no option or two is counted; an image has one side."""
    few, other = omni(4, "no.", option_A="Yes", option_B="No"), omni(5, modality="CT")
    del few["option_C"], few["option_D"], other["modality_type"]
    grades, name = dict(option_A="grade +", option_B="grade ++"), "QA_information/Open-access/ACRIMA.json"
    write(tmp_path, {name: says(json.dumps([
        omni(0), omni(1, " fundus  Imaging. "), omni(2, "X ray scan"), omni(3, "Xray scan"), few, other, omni(6, "MRI"),
        omni(7, option_A="fundus imaging."), omni(8, "grade ++ ", **grades), omni(9, "grade", **grades)]))})
    records = {r["id"][7:]: r for r in data.read_records(tmp_path / name)}
    assert {k: r["answer"] for k, r in records.items()} == dict(zip("01234578", "DDBBBDDB", strict=True))
    assert "2 of 10 questions can't be used, as question 7: gt_answer fits 0 options" in capsys.readouterr().err
    r = records["0"]
    assert r["path"] == str((tmp_path / "Images/ACRIMA/0.png").resolve()) and r["task"] == "modality recognition"
    assert (r["modality"], records["5"]["modality"], r["source"]) == ("Fundus Photography", "CT", "ACRIMA")
    assert records["4"]["options"] == ["Yes", "No"] and r["group"] == r["image"] and r["thought"] is None
    write(tmp_path, {name: says(json.dumps([*map(omni, range(400))]))})
    sides = Counter((r["image"], r["split"]) for r in data.read_records(tmp_path / name))
    assert set(sides.values()) == {2} and 110 <= sum(split == "train" for _, split in sides) <= 170

def test_only(two):
    """Values of one key are alternatives, keys go together, case doesn't count; what can't be is told."""
    file = two / "whole" / "medad38k.jsonl"
    records = data.read_records(file, "train", only=["modality=microscopy", "task=anatomy", "task=anomaly"])
    assert {(r["modality"], r["split"]) for r in records} == {("Microscopy", "train")}
    assert {r["task"] for r in records} == {"anatomy", "anomaly"}
    for only, text in (("colour=red", "colour"), ("modality", "KEY=VALUE"), ("modality=", "KEY=VALUE"),
                       ("modality=PET", "no usable record with modality=PET")):
        with pytest.raises(data.DataError, match=text):
            data.read_records(file, only=[only])

def test_thinking(two, tmp_path):
    """Prompt and target of each mode: thought first, none, or after the answer; without a thought only `none` has a target."""
    one, other, *_ = data.read_records(two / "whole" / "medad38k.jsonl")
    data.write_records([{**one, "thought": "So."}, other], tmp_path / "q.jsonl")
    targets = {"before": "<think>So.</think><answer>{}</answer>", "none": "<answer>{}</answer>",
               "after": "<answer>{}</answer><think>So.</think>"}
    assert set(rewards.INSTRUCTIONS) == set(targets)
    for mode, target in targets.items():
        a, b = data.read_records(tmp_path / "q.jsonl", thinking=mode)
        asked = rewards.question_text(a)
        assert asked.startswith(a["question"] + "\nA) ") and asked.endswith(rewards.INSTRUCTIONS[mode])
        assert ("<think>" in asked) == (mode != "none") and rewards.answer_text(a) == target.format(a["answer"])
        if mode != "none":
            with pytest.raises(data.DataError, match="no thought"):
                rewards.answer_text(b)
    assert rewards.answer_text(b | {"thinking": "none"}) == f"<answer>{b['answer']}</answer>"


def test_an_ellipse_is_turned(tmp_path):
    """Long in x, turned by a right angle: long in y."""
    shape = dict(name="ellipse", cx=30, cy=20, rx=12, ry=2, theta=math.pi / 2)
    write(tmp_path, {"a.json": says(json.dumps({"a": {"filename": "a.jpg", "regions": [{"shape_attributes": shape}]}}))})
    (name, points), = data.via_outlines(tmp_path / "a.json")
    assert name == "a" and np.ptp(points, 0) == pytest.approx((4, 24), rel=0.02)
    assert np.mean(points[:-1], 0) == pytest.approx((30, 20), abs=0.1)


def test_a_slice_with_a_speck_of_the_lesion_is_not_healthy(tmp_path):
    """Too little to ask about, too much to be called normal: it is left out."""
    noise = np.random.default_rng(0).integers(-300, 300, (64, 64, 16), dtype=np.int16)
    lesion = np.zeros((64, 64, 16), np.uint8)
    lesion[30, 30, 4:12] = 1           # one pixel of 4096
    lesion[20:40, 20:40, 7] = 1
    lesion[:, :, 8] = 0
    scan(tmp_path / "a.nii", noise)
    scan(tmp_path / "m.nii", lesion)
    job = dict(path=str(tmp_path / "a.nii"), masks=[str(tmp_path / "m.nii")], least=1, window=())
    shown = {suffix: mask.sum() for _, mask, suffix in data.slices(job)}
    assert shown == {"-007": 400, "-008": 0}
